"""Peak memory of a training step, part by part, from the shape of the model and the settings of the
run.

The sum includes what autograd keeps of a block, tensor by tensor (`kept_by_block`), what the
backward pass adds, weights, optimizer states and gradients, and the fused head. A step has four
candidates for the peak: the loss, when all activations are kept; the start of the backward pass;
its end, at the embedding; the optimizer step. With `gradient_checkpointing` the peak is the largest
of them. Without it the allocator keeps what was freed, so the largest size of each part is added,
plus fragmentation. The interpreter with its libraries (`RUNTIME_GIB`) and the mapped dataset and
cache, which the system can drop at any time, are not included. `benchmarks/plan_accuracy.py`
compares with measured peaks.
"""

from dataclasses import dataclass

from xinslm.device import pick_device
from xinslm.losses.fused import PIECE_ROWS, chunk_positions
from xinslm.model.config import ModelConfig
from xinslm.train.config import PretrainConfig

RUNTIME_GIB = 0.5
"""Python, PyTorch and transformers, loaded and idle."""
SMALLEST_IN_8_BITS = 4096
PIECE = 1 << 16
FRAGMENTATION = 0.15
"""Share of the activations that the allocator adds when it keeps freed blocks; three times that
with gradient accumulation.
"""
TARGET_BYTES = 400
"""Labels, teacher targets and their temporaries of one position."""


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at the peak."""

    moment: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Total bytes, without the idle interpreter."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Matrix:
    """A kind of trained matrix: its size, and how many the model has."""

    rows: int
    columns: int
    count: int
    hidden: bool

    @property
    def size(self) -> int:
        """Parameters in one of them."""
        return self.rows * self.columns


def _widths(shape: ModelConfig) -> tuple[int, int]:
    """Sizes of all queries of a token, and of all its keys."""
    return shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim


def matrices(shape: ModelConfig) -> list[Matrix]:
    """All trained matrices of a model."""
    d, f, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    query, shared = _widths(shape)
    return [
        Matrix(shape.vocab_size, d, 1 if shape.tie_word_embeddings else 2, hidden=False),
        Matrix(query, d, 2 * layers, hidden=True),
        Matrix(shared, d, 2 * layers, hidden=True),
        Matrix(f, d, 3 * layers, hidden=True),
    ]


def kept_by_block(shape: ModelConfig, tokens: int, width: int) -> int:
    """Bytes that autograd keeps of one block for `tokens` positions.

    width: bytes per element of the activations. Norms keep their input, one float32 number and, for
    the products, their output; attention keeps q, k, v and its output; SwiGLU keeps three times its
    width.
    """
    d, f = shape.hidden_size, shape.intermediate_size
    query, shared = _widths(shape)
    norms = 2 * (2 * width * d + 4)
    if shape.qk_norm:  # of their input only: the rotation keeps nothing but its tables
        norms += width * (query + shared) + 4 * (
            shape.num_attention_heads + shape.num_key_value_heads
        )
    attention = width * (2 * query + 2 * shared) + 4 * shape.num_attention_heads
    return tokens * (norms + attention + width * 3 * f)


def step_memory(shape: ModelConfig, config: PretrainConfig) -> Memory:
    """Peak of an optimizer step of this model in this run."""
    all_matrices, vectors = matrices(shape), shape.num_vector_parameters
    states = sum(m.count * state_bytes(m, config.optimizer) for m in all_matrices) + 8 * vectors
    always = {"weights": _param_bytes(shape, config), "optimizer states": states}
    hidden = sum(m.size * m.count for m in all_matrices if m.hidden)
    if config.quantization_aware:
        always["4-bit copies of the weights"] = _width(config) * hidden
    elif _width(config) < _stored_bytes(config):
        always["bfloat16 copies of the weights"] = 2 * hidden
    moments = _moments(shape, config)
    if config.gradient_checkpointing:
        found = [Memory(moment, always | parts) for moment, parts in moments.items()]
        return max(found, key=lambda memory: memory.peak)
    names = dict.fromkeys(name for parts in moments.values() for name in parts)
    most = {name: max(parts.get(name, 0) for parts in moments.values()) for name in names}
    factor = 3 if _accumulates(config) else 1
    gaps = round(FRAGMENTATION * factor * most["activations"])
    return Memory("summed over a step", always | most | {"fragmentation": gaps})


def _moments(shape: ModelConfig, config: PretrainConfig) -> dict[str, dict[str, int]]:
    """Bytes of each part at the four moments of a step, without weights and optimizer states."""
    d, stored = shape.hidden_size, _stored_bytes(config)
    tokens = (config.micro_batch_size or config.batch_size) * config.max_seq_length
    embedding, fused = shape.vocab_size * d, config.optimizer_in_backward
    width = _width(config)
    # the head's gradient in float32, the head in the type of the products, and a product of that
    # type where it cannot be added in place
    head = 4 * embedding + (stored != width) * width * embedding + (width == 2) * 2 * embedding
    chunk = min(chunk_positions(shape.vocab_size, width), tokens)
    loss = tokens * (2 * width * d + TARGET_BYTES)
    loss += (width * chunk + 4 * PIECE_ROWS) * shape.vocab_size
    head_gradient = embedding * stored
    gradients = 0 if fused else _param_bytes(shape, config)
    single = max(m.size for m in matrices(shape) if m.hidden) * (stored + 4)
    begun = gradients if _accumulates(config) else head_gradient
    at_loss, at_start, at_end = _activations(shape, config, tokens)
    return {
        "the loss": {
            "gradients": gradients if _accumulates(config) else 0,
            "activations": at_loss,
            "head and loss": head + loss,
        },
        "the start of the backward pass": {
            "gradients": begun + (single if fused else 0),
            "activations": at_start,
            "head and loss": width * tokens * d,
        },
        "the end of the backward pass": {
            "gradients": gradients + embedding * (stored + 4) + (head_gradient if fused else 0),
            "activations": at_end,
            "head and loss": 0,
        },
        "the optimizer step": {
            "gradients": gradients + (2 * head_gradient if fused else 0),
            "activations": 0,
            "head and loss": 0,
            "optimizer temporaries": _temporary(matrices(shape), config),
        },
    }


def _activations(shape: ModelConfig, config: PretrainConfig, tokens: int) -> tuple[int, int, int]:
    """Bytes at the loss, at the start and at the end of the backward pass."""
    d, f, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    width = _width(config)
    block = kept_by_block(shape, tokens, width)
    has_mask = config.compile or pick_device(config.device).type != "cpu"
    mask = tokens * config.max_seq_length * width if has_mask else 0
    # gradients inside a block
    passing = tokens * max(width * (2 * d + 3 * f), 3 * 4 * d)
    # the float32 copy of a bfloat16 matrix that is multiplied
    is_widened = _stored_bytes(config) < width
    widened = 4 * max(m.size for m in matrices(shape)) if is_widened else 0
    if config.gradient_checkpointing:
        kept, inside = (layers + 3) * width * tokens * d, block
    else:
        kept, inside = layers * block + 3 * width * tokens * d, 0
    return kept + mask, kept + inside + mask + passing + widened, block + mask + passing


def _width(config: PretrainConfig) -> int:
    """Bytes of one activation."""
    return 4 if config.compute_dtype == "float32" else 2


def _stored_bytes(config: PretrainConfig) -> int:
    """Bytes of one parameter of a matrix."""
    return 4 if config.param_dtype == "float32" else 2


def _param_bytes(shape: ModelConfig, config: PretrainConfig) -> int:
    """Bytes of all weights, and of all gradients."""
    numbers = sum(m.size * m.count for m in matrices(shape))
    return numbers * _stored_bytes(config) + 4 * shape.num_vector_parameters


def _accumulates(config: PretrainConfig) -> bool:
    return (config.micro_batch_size or config.batch_size) < config.batch_size


def state_bytes(matrix: Matrix, optimizer: str) -> int:
    """Bytes of the optimizer states of one matrix between steps."""
    if optimizer == "muon" and matrix.hidden:
        return 4 * matrix.size
    if optimizer == "adamw8bit" and matrix.size >= SMALLEST_IN_8_BITS:
        return 2 * matrix.size + 8 * -(-matrix.size // 256)
    return 8 * matrix.size


def _temporary(all_matrices: list[Matrix], config: PretrainConfig) -> int:
    """Temporary bytes of the optimizer step; Muon holds seven copies of a matrix."""
    if config.optimizer == "muon":
        return 7 * 4 * max(m.size for m in all_matrices if m.hidden)
    return 16 * 4 * PIECE
