"""The forward pass that becomes a Core ML program: that of `Transformer`, with keys and values in
buffers and written for `torch.jit.trace`.

Core ML computes in float16, and that decides how some steps are written. Positions are never
floats: rotary angles come from tables, because float16 has no odd integers above 2,048. `RootMean`
stays in float32 (convert.py), because the square of 256 is beyond float16. Query heads that share
keys are rows of one product, so no key is copied.

Shapes: T new tokens, S tokens with those of the past, H query heads, K key heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xinslm.model.config import ModelConfig
from xinslm.model.transformer import rotary_frequencies

INPUT_IDS, MASK, LOGITS = "inputIds", "fullAttentionMask", "logits"
"""Inputs and output; with the states, the names that swift-transformers looks for."""
KEYS, VALUES = "keyCache", "valueCache"
"""States."""


class RootMean(nn.Module):
    """One over the root mean square of each row; a module, so that its operations bear its name."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., 1)."""
        return torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.scale = RootMean(eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return x * self.scale(x) * self.weight


class Attention(nn.Module):
    """Grouped-query attention that writes to and reads from the states."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        query, shared = self.heads * config.head_dim, self.key_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_output_bias)
        self.has_norms = config.qk_norm
        if self.has_norms:
            self.q_norm = Norm(config.head_dim, config.rms_norm_eps)
            self.k_norm = Norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, step: "Step") -> Tensor:
        """(1, T, hidden) -> (1, T, hidden)."""
        q = self._split(self.q_proj(x), self.heads)
        k = self._split(self.k_proj(x), self.key_heads)
        v = self._split(self.v_proj(x), self.key_heads)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._rotate(q, step), self._rotate(k, step)
        keys, values = step.extend(self.layer, k, v)
        grouped = q.reshape(1, self.key_heads, -1, self.head_dim)  # (1, K, H / K * T, D)
        y = F.scaled_dot_product_attention(grouped, keys, values, step.mask)
        y = y.reshape(1, self.heads, -1, self.head_dim).transpose(1, 2)
        return self.o_proj(y.reshape(1, -1, self.heads * self.head_dim))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(1, -1, heads, self.head_dim).transpose(1, 2)  # (1, heads, T, D)

    def _rotate(self, x: Tensor, step: "Step") -> Tensor:
        half = self.head_dim // 2  # a size taken from `x` would be a variable of the program
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * step.cos + turned * step.sin


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, hidden) -> (1, T, hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then feed-forward, each on the normalized residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), FeedForward(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: "Step") -> Tensor:
        """(1, T, hidden) -> (1, T, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """`model` in Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class Step:
    """What the layers share in one call: places in the states, rotary tables, mask."""

    def __init__(self, model: "StatefulTransformer", input_ids: Tensor, mask: Tensor) -> None:
        config = model.config
        # sizes, not values: `torch.jit.trace` keeps them variable
        self.stop = mask.shape[-1]
        self.start = self.stop - input_ids.shape[-1]
        self.keys, self.values = model.keyCache, model.valueCache
        self.cos = model.cos[self.start : self.stop]  # (T, D)
        self.sin = model.sin[self.start : self.stop]
        groups = config.num_attention_heads // config.num_key_value_heads
        self.mask = mask.repeat(1, 1, groups, 1)  # (1, 1, H / K * T, S)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (1, K, T, D) behind the past of a layer; return all, (1, K, S, D)."""
        self.keys[layer : layer + 1, :, self.start : self.stop] = keys
        self.values[layer : layer + 1, :, self.start : self.stop] = values
        past = slice(0, self.stop)
        return self.keys[layer : layer + 1, :, past], self.values[layer : layer + 1, :, past]


class StatefulTransformer(nn.Module):
    """A causal language model whose two states hold the keys and values of `length` tokens."""

    # a state has the name of its buffer
    keyCache: Tensor
    valueCache: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        self.config, self.length = config, length
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        register_states(self, config, length)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (1, T, vocabulary) of ids (1, T) that follow the S - T tokens in the states;
        `mask` (1, 1, T, S) is added to the attention scores.
        """
        step = Step(self, input_ids, mask)
        x = self.model.embed_tokens(input_ids)
        for block in self.model.layers:
            x = block(x, step)
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return F.linear(self.model.norm(x), head)


def register_states(module: nn.Module, config: ModelConfig, length: int) -> None:
    """Add the states (layers, K, length, D), zero, and the rotary tables (length, D) as buffers."""
    shape = config.num_hidden_layers, config.num_key_value_heads, length, config.head_dim
    for name in (KEYS, VALUES):
        module.register_buffer(name, torch.zeros(shape, device="cpu"))
    positions = torch.arange(length, device="cpu").float()
    angles = torch.outer(positions, rotary_frequencies(config)).repeat(1, 2)
    module.register_buffer("cos", angles.cos())
    module.register_buffer("sin", angles.sin())


def causal_mask(length: int, past: int = 0) -> Tensor:
    """What is added to the scores of `length` tokens after `past` others, (1, 1, T, S)."""
    mask = torch.full((length, past + length), -65504.0)  # the lowest float16; a sum stays a number
    return mask.triu(past + 1)[None, None]
