"""The student: a LLaMA-style decoder in plain PyTorch, with Hugging Face's parameter names.

RMSNorm before each half of a block, grouped-query attention, rotary positions, SwiGLU, tied
embeddings, optional sliding window; biases as in Qwen2 and norms of heads as in Qwen3. The
`state_dict` is the checkpoint format of transformers and needs no conversion; the logits are equal
(`tests/model/test_transformer.py`). Shapes: B batch, T sequence length, H query heads, K key heads,
D head dimension.

    model = Transformer(config)
    logits = model.logits(model.hidden(input_ids))      # (B, T) -> (B, T, vocabulary)
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xinslm.model.attention import LONG, SHORT, Tile, attend, cut_into_tiles, document_lengths
from xinslm.model.config import ModelConfig
from xinslm.model.gate import gated
from xinslm.model.int8_inputs import int8_product
from xinslm.model.param_dtype import Linear, embed
from xinslm.model.rms_norm import RMSNorm

Mask = Tensor | tuple[Tile, ...] | None
"""What limits attention: a mask, the tiles of rows on a CPU, or nothing but the tokens' order."""


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return radians per position of the head's D/2 pairs, float32, with LLaMA-3's rescaling; on
    the CPU, also where the model is made on the meta device.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
    exponents = pairs.float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    wavelengths = 2 * math.pi / frequencies
    old_context = s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    blend = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * frequencies / s["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of a head by its position's angle; tables (B or 1, 1, T, D)."""
    result: Tensor = _Rotate.apply(x, cos, sin)
    return result


class _Rotate(torch.autograd.Function):
    """The gradient is rotated back; autograd would pad and add halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).add_(_turned(x, sin))  # x's layout, which attention keeps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).sub_(_turned(grad, sin)), None, None


def _turned(x: Tensor, sin: Tensor) -> Tensor:
    """A quarter turn of each pair, times its sine."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1).mul_(sin)


class KVCache:
    """Keys and values of past positions, allocated once at full length: (layers, B, K, max_length,
    D).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ):
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            max_length,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        """Positions filled so far, the same for all rows."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D), return all keys and values; `length` increases after all layers."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache has {self.keys.shape[3]} positions, but {end} are needed")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with fewer key than query heads (GQA, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query, shared = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = Linear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.o_proj = Linear(query, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.has_norms = config.qk_norm

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, hidden) -> rotated queries (B, H, T, D) and keys (B, K, T, D), values."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, -1, self.head_dim)
        k = self.k_proj(x).view(b, t, -1, self.head_dim)
        v = self.v_proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k = self.normalize(q, k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize each head of queries and keys (..., D), if the model does."""
        return (self.q_norm(q), self.k_norm(k)) if self.has_norms else (q, k)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None
    ) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden); without a mask, causal."""
        return self.o_proj(self.mix(x, cos, sin, mask, cache))

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        """(B, T, hidden) -> outputs of all heads next to each other, (B, T, H * D)."""
        b, t, _ = x.shape
        q, k, v = self.project(x, cos, sin)
        if isinstance(mask, tuple):
            if cache is not None:
                cache.extend(self.layer, k, v)
            return attend(q, k, v, mask).transpose(1, 2).reshape(b, t, -1)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and t > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return y.transpose(1, 2).reshape(b, t, -1)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One decoder layer: attention, then feed-forward, each on the normalized residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Embedding):
    """nn.Embedding that needs no import of torch's compiler on the meta device."""

    def reset_parameters(self) -> None:
        """Draw initial values, unless the weight has no memory yet."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    """Embedding, blocks and final norm; `model` in Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model; `gradient_checkpointing` saves training memory at the cost of a
    second forward pass.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        config.check()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        self.compute_dtype: torch.dtype | None = None
        """Type of the residual stream and of the products; None means that of the weights."""
        self.int8_head = False
        """Whether the head's inputs are rounded to int8."""
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from N(0, 0.02), set norms to 1 and biases to 0 (GPT-2).

        Projections into the residual stream are smaller by sqrt(2 layers).
        """
        residual = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                deviation = (
                    residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                )
                nn.init.normal_(weight, std=deviation, generator=generator)
            else:
                nn.init.constant_(weight, 0.0 if name.endswith(".bias") else 1.0)

    @property
    def head_weight(self) -> Tensor:
        """Output matrix (vocabulary, hidden); the embedding if tied."""
        return (
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )

    @property
    def int8_layers(self) -> tuple[int, int]:
        """Linear layers whose inputs are rounded to int8, and all of them, the head included."""
        flags = [module.int8_inputs for module in self.modules() if isinstance(module, Linear)]
        return sum(flags) + self.int8_head, len(flags) + 1

    def round_inputs(self, names: Collection[str]) -> None:
        """Multiply these weights, named as in the state dict and dequantized from codes in blocks
        of 32, with inputs rounded to int8. Looking up an embedding is no product.
        """
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.int8_inputs = f"{name}.weight" in names
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        self.int8_head = f"{head}.weight" in names

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(..., hidden) -> (..., vocabulary); rows (n, hidden) may go into memory `out`."""
        if self.int8_head:
            return int8_product(hidden, self.head_weight)
        weight = self.head_weight.to(hidden.dtype)
        return F.linear(hidden, weight) if out is None else torch.mm(hidden, weight.T, out=out)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables (B or 1, 1, T, D) for positions (B or 1, T)."""
        angles = positions[:, None, :, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def mask(
        self, length: int, past: int, segments: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Return the attention mask, bool (B or 1, 1, T, past + T); None if causal masking
        suffices.
        """
        window = self.config.sliding_window
        if window is not None and past + length <= window:
            window = None
        if segments is None and window is None and (past == 0 or length == 1):
            return None
        key = torch.arange(past + length, device=device)
        query = key[past:, None]
        allowed = key <= query
        if window is not None:
            allowed &= key > query - window
        if segments is None:
            return allowed[None, None]
        return (allowed & (segments[:, :, None] == segments[:, None, :]))[:, None]

    def attended(self, ids: Tensor, segments: Tensor | None, past: int = 0) -> Mask:
        """Return the `mask` of blocks for ids (B, T): on a CPU, tiles if nothing comes before."""
        rows, length = ids.shape
        assert segments is None or segments.shape == ids.shape, "a number for each token"
        if past or length < SHORT or ids.device.type != "cpu" or torch.compiler.is_compiling():
            return self.mask(length, past, segments, ids.device)
        lengths = [[length]] * rows if segments is None else document_lengths(segments)
        window = self.config.sliding_window
        window = None if window is None or window >= length else window
        if length >= LONG and all(len(row) == 1 for row in lengths) and window is None:
            return None
        return cut_into_tiles(lengths, window, self.config.num_attention_heads)

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        layers: Sequence[int] = (),
    ) -> Any:
        """Run the blocks and the final norm: ids (B, T) -> (B, T, hidden).

        In a packed sequence, `positions` (B, T) restart at each document and `segments` (B, T)
        number the documents, each in one run, which attention does not cross. With a `cache`, the
        ids continue its content; it cannot be used with `segments`. With `layers` (numbers of
        blocks from 1), return a pair: the hidden states, and a list of the outputs of those blocks.
        """
        assert cache is None or segments is None, (
            "packed sequences are for training, a cache is for generation"
        )
        past = cache.length if cache is not None else 0
        length = input_ids.shape[1]
        if positions is None:
            positions = torch.arange(past, past + length, device=input_ids.device)[None]
        mask = self.attended(input_ids, segments, past)
        weight = self.model.embed_tokens.weight
        x = embed(input_ids, weight, self.compute_dtype or weight.dtype)
        # otherwise a compiled attention allocates and keeps a float mask per block
        if isinstance(mask, Tensor) and self.training and x.device.type == "cpu":
            mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        cos, sin = self.rotary(positions, x.dtype)
        outputs = {}
        for depth, block in enumerate(self.model.layers, start=1):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
            if depth in layers:
                outputs[depth] = x
        if cache is not None:
            cache.length += length
        hidden = self.model.norm(x)
        return (hidden, [outputs[depth] for depth in layers]) if layers else hidden
