"""Floating-point operations of a transformer; a multiplication and an addition count as two."""

from xinslm.model.config import ModelConfig


def forward_operations(shape: ModelConfig, length: int) -> tuple[float, float]:
    """Operations per token of a forward pass over rows of `length`: of the blocks, and of the head.

    Two per parameter of the matrices, plus attention over half the row (PaLM, arXiv:2204.02311,
    appendix B).
    """
    d, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    shared = shape.num_key_value_heads * shape.head_dim
    matrices = d * (2 * heads + 2 * shared + 3 * shape.intermediate_size)
    seen = min(length, shape.sliding_window or length) / 2
    blocks = shape.num_hidden_layers * (2.0 * matrices + 4 * seen * heads)
    return blocks, 2.0 * shape.vocab_size * d


def training_operations(shape: ModelConfig, length: int) -> float:
    """Operations per token of a forward and a backward pass, which costs two forward passes."""
    return 3 * sum(forward_operations(shape, length))
