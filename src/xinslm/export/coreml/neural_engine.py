"""The forward pass as the Neural Engine takes it: the same numbers as `program.py`, other shapes.

What Apple published decides the form. All shapes are fixed, because a model with a range of shapes
runs on the Neural Engine at its default shape only (Apple engineer, developer forums, thread
724930): each call reads `TOKENS` tokens, and attention reads all of the states, hidden places
included. Linear layers are convolutions over (1, channels, 1, tokens), as in "Deploying
Transformers on the Apple Neural Engine" (2022), and all arithmetic is float16, so RMSNorm divides
by the largest number of a row before it squares. Nothing of this has run on a Mac.

Shapes: T = `TOKENS`, S places of the states, H query heads, K key heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xinslm.export.coreml.program import register_states
from xinslm.model.config import ModelConfig

TOKENS = 16
"""Tokens of a call. A shorter text is filled up behind its end: what the states get there is
hidden by the mask, and the next call overwrites it.
"""
POSITION = "position"
"""Third input: the number of tokens in the states."""
HIDDEN = -1e4
"""What the mask adds where a token does not see another, as in Apple's implementation."""


class Norm(nn.Module):
    """RMSNorm along dimension 1 or 2 that no float16 overflows.

    x / sqrt(mean(x^2) + eps) is the same for x / s and eps / s^2 with any s; s is the largest
    magnitude of the row, but not so small that eps / s^2 overflows.
    """

    def __init__(self, size: int, eps: float, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, *(1,) * (3 - dim)))
        self.dim, self.root = dim, eps**0.5

    def forward(self, x: Tensor) -> Tensor:
        """(1, size, 1, T) or, along dimension 2, (1, heads, size, T); the result has its shape."""
        largest = x.abs().amax(self.dim, keepdim=True).clamp(min=self.root / 16)
        x = x / largest
        # as a tensor: of a number divided by one coremltools makes 1 / (x + 1e-4)
        root = torch.tensor(self.root) / largest
        mean = (x * x).mean(self.dim, keepdim=True)
        return x * torch.rsqrt(mean + root * root) * self.weight


class Attention(nn.Module):
    """Grouped-query attention over all places of the states."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, bias = config.hidden_size, config.attention_bias
        query, shared = self.heads * config.head_dim, self.key_heads * config.head_dim
        self.q_proj = nn.Conv2d(hidden, query, 1, bias=bias)
        self.k_proj = nn.Conv2d(hidden, shared, 1, bias=bias)
        self.v_proj = nn.Conv2d(hidden, shared, 1, bias=bias)
        self.o_proj = nn.Conv2d(query, hidden, 1, bias=config.attention_output_bias)
        self.has_norms = config.qk_norm
        if self.has_norms:
            self.q_norm = Norm(config.head_dim, config.rms_norm_eps, 2)
            self.k_norm = Norm(config.head_dim, config.rms_norm_eps, 2)

    def forward(self, x: Tensor, step: "Step") -> Tensor:
        """(1, hidden, 1, T) -> (1, hidden, 1, T)."""
        q = self.q_proj(x).view(1, self.heads, self.head_dim, TOKENS)
        k = self.k_proj(x).view(1, self.key_heads, self.head_dim, TOKENS)
        v = self.v_proj(x).view(1, self.key_heads, self.head_dim, TOKENS)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self._rotate(q, step) * self.head_dim**-0.5
        keys, values = step.extend(self.layer, self._rotate(k, step), v)
        grouped = q.transpose(2, 3).reshape(1, self.key_heads, -1, self.head_dim)
        scores = grouped @ keys.transpose(2, 3) + step.mask  # (1, K, H / K * T, S)
        y = (scores.softmax(-1) @ values).view(1, self.heads, TOKENS, self.head_dim)
        return self.o_proj(y.transpose(2, 3).reshape(1, -1, 1, TOKENS))

    def _rotate(self, x: Tensor, step: "Step") -> Tensor:
        half = self.head_dim // 2
        turned = torch.cat((-x[:, :, half:], x[:, :, :half]), dim=2)
        return x * step.cos + turned * step.sin


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Conv2d(hidden, inner, 1, bias=False)
        self.up_proj = nn.Conv2d(hidden, inner, 1, bias=False)
        self.down_proj = nn.Conv2d(inner, hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, hidden, 1, T) -> (1, hidden, 1, T)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then feed-forward, each on the normalized residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), FeedForward(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps, 1)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps, 1)

    def forward(self, x: Tensor, step: "Step") -> Tensor:
        """(1, hidden, 1, T) -> (1, hidden, 1, T)."""
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Table(nn.Module):
    """The embedding as the kernel of a convolution, which is also the LM head of a tied model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, 1, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(1, T) -> (1, hidden, 1, T)."""
        rows = self.weight.index_select(0, input_ids.view(-1))  # (T, hidden, 1, 1)
        return rows.permute(2, 1, 3, 0)


class Decoder(nn.Module):
    """`model` in Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Table(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, 1)


class Step:
    """What the layers share in one call: places in the states, rotary tables, mask."""

    def __init__(self, model: "FixedTransformer", mask: Tensor, position: Tensor) -> None:
        config = model.config
        self.start = position[0]
        self.keys, self.values = model.keyCache, model.valueCache
        places = position + torch.arange(TOKENS, dtype=torch.int32)
        self.cos = model.cos.index_select(0, places).transpose(0, 1)  # (D, T)
        self.sin = model.sin.index_select(0, places).transpose(0, 1)
        groups = config.num_attention_heads // config.num_key_value_heads
        self.mask = mask.repeat(1, 1, groups, 1)  # (1, 1, H / K * T, S)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (1, K, D, T) behind the past of a layer; return all places, (1, K, S, D)."""
        places = slice(self.start, self.start + TOKENS)
        self.keys[layer : layer + 1, :, places] = keys.transpose(2, 3)
        self.values[layer : layer + 1, :, places] = values.transpose(2, 3)
        return self.keys[layer : layer + 1], self.values[layer : layer + 1]


class FixedTransformer(nn.Module):
    """A causal language model whose two states hold the keys and values of `length` tokens."""

    keyCache: Tensor
    valueCache: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        self.config, self.length = config, length
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Table(config)
        register_states(self, config, length)

    def forward(self, input_ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        """Logits (1, T, vocabulary) of ids (1, T) that follow `position` (1,) tokens; `mask`
        (1, 1, T, S) is added to the attention scores.
        """
        step = Step(self, mask, position)
        x = self.model.embed_tokens(input_ids)
        for block in self.model.layers:
            x = block(x, step)
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight
        logits = F.conv2d(self.model.norm(x), head)  # (1, vocabulary, 1, T)
        return logits.squeeze(2).transpose(1, 2)


def fixed_mask(new: int, past: int, length: int) -> Tensor:
    """What is added to the scores of `new` <= T tokens after `past` others, (1, 1, T, length);
    the rows of the tokens that fill up the call see what the last one would.
    """
    assert new <= TOKENS and past + TOKENS <= length, "a call stays within the states"
    seen = torch.arange(length) <= past + torch.arange(TOKENS)[:, None]
    return torch.where(seen, 0.0, HIDDEN)[None, None]
