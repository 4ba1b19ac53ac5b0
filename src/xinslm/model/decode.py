"""A `Transformer` that generates: rows of different lengths in one key-value cache.

Each row has its own position, so a new text can take the place of one that ended. The tokens of a
head are neighbours in the cache, so a step reads each head's keys in order, and the query heads
that share them go through the attention together. On a CPU the weights are packed (`packed.py`).
Logits equal those of `Transformer` up to rounding. Shapes: B rows, T tokens, V vocabulary, H query
heads, K key heads, D head dimension.

    decoder = RowDecoder(model, rows=2, length=64)
    logits, _ = decoder.read([0, 1], [first_prompt, second_prompt])  # (2, V)
    logits = decoder.step(logits.argmax(1))                          # (2, V)
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.model.int8_inputs import int8_product
from xinslm.model.packed import Product, can_pack, product
from xinslm.model.param_dtype import Linear
from xinslm.model.transformer import Transformer, rotate

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From the layer's number, queries (B, T, H, D), keys and values (B, K, T, D) to (B, T, H, D)."""

READ_TOKENS = 4096
"""Prompt tokens in one forward pass."""
LEAST_SHARED = 8
"""Shorter common beginnings are read in each row: that is one pass less."""


def token_bytes(model: Transformer) -> int:
    """Bytes of a token's keys and values."""
    c = model.config
    per_layer = 2 * c.num_key_value_heads * c.head_dim * model.head_weight.element_size()
    return c.num_hidden_layers * per_layer


def _joined(linears: list[Linear], rows: int, pack: bool) -> Product:
    """The outputs of linear layers one after the other, as one product where nothing is rounded."""
    if any(linear.int8_inputs for linear in linears):
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)
    multiply = product([linear.weight for linear in linears], rows, pack)
    if linears[0].bias is None:
        return multiply
    bias = torch.cat([linear.bias for linear in linears])
    return lambda x: multiply(x).add_(bias)


class _Layer:
    """A block with its matrices joined: queries, keys and values; gate and up."""

    def __init__(self, block: Any, rows: int, pack: bool) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.attention = attention
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj], rows, pack)
        self.out = _joined([attention.o_proj], rows, pack)
        self.gate_up = _joined([mlp.gate_proj, mlp.up_proj], rows, pack)
        self.down = _joined([mlp.down_proj], rows, pack)


class RowDecoder:
    """Reads prompts into rows and appends a token to each row; no gradients."""

    refills = True
    """`read` may be called at any time."""

    def __init__(
        self, model: Transformer, rows: int, length: int, vocab_size: int | None = None
    ) -> None:
        head = model.head_weight
        self.model, self.config, self.device = model, model.config, head.device
        c = model.config
        shape = c.num_hidden_layers, rows, c.num_key_value_heads, length, c.head_dim
        self.keys = torch.zeros(shape, dtype=head.dtype, device=head.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = np.zeros(rows, np.int64)
        """Tokens in each row."""
        self.count = 0
        """Rows in use, from the first."""
        self.token_forwards = 0
        """Tokens that went through the model, with pads and rows that had ended."""
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        pack = rows > 0 and can_pack(head, size)
        self.layers = [_Layer(block, rows, pack) for block in model.model.layers]
        self.head = product([head[:vocab_size]], rows, pack and not model.int8_head)
        if model.int8_head:
            self.head = lambda x: int8_product(x, head[:vocab_size])

    @torch.inference_mode()
    def read(self, rows: Sequence[int], prompts: Sequence[np.ndarray]) -> tuple[Tensor, np.ndarray]:
        """Make prompts (ids, at least one) the content of `rows`; return the next logits
        (len(rows), V) and how many tokens were read of each: all.

        Prompts of similar length should be neighbours: they are padded on the right. A beginning
        that all share, such as a system prompt, goes through the model once.
        """
        shared = shared_beginning(prompts)
        if shared:
            self._read(np.asarray(rows[:1]), [prompts[0][:shared]])
            others = torch.as_tensor(rows[1:], device=self.device)
            for buffer in (*self.keys, *self.values):
                buffer[others, :, :shared] = buffer[rows[0], :, :shared]
        longest = max(len(prompt) for prompt in prompts)
        chunk = max(1, READ_TOKENS // longest)
        logits = []
        for first in range(0, len(prompts), chunk):
            part = [prompt[shared:] for prompt in prompts[first : first + chunk]]
            logits.append(self._read(np.asarray(rows[first : first + chunk]), part, shared))
        self.count = max(self.count, max(rows) + 1)
        return torch.cat(logits), self.lengths[np.asarray(rows)]

    @torch.inference_mode()
    def extend(self, ids: np.ndarray) -> Tensor:
        """Append ids (at least one) to the first row, the only one in use; the next logits (V,)."""
        past, self.count = int(self.lengths[0]), 1
        if past and len(ids) == 1:
            return self.step(torch.from_numpy(ids))[0]
        return self._read(np.zeros(1, np.int64), [ids], past)[0]

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        more = (0, 0, 0, max(0, length - self.keys.shape[3]))
        self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)

    def _read(self, rows: np.ndarray, prompts: Sequence[np.ndarray], past: int = 0) -> Tensor:
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        end = past + longest
        mask = self.model.mask(longest, past, None, self.device)
        positions = torch.arange(past, end, device=self.device)[None]
        index = torch.from_numpy(rows).to(self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[index, :, past:end], values[index, :, past:end] = k, v
            if past:
                k, v = keys[index, :, :end], values[index, :, :end]
            return _attention(q, k, v, mask, causal=mask is None)

        x = self._blocks(torch.from_numpy(ids).to(self.device), positions, attend)
        self.lengths[rows] = past + lengths
        last = torch.from_numpy(lengths - 1).to(self.device)
        return self.head(self.model.model.norm(x[torch.arange(len(rows)), last]))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row in use, (B,); the next logits (B, V)."""
        count = self.count
        # a row whose text has ended may be full
        lengths = np.minimum(self.lengths[:count], self.keys.shape[3] - 1)
        width = int(lengths.max()) + 1
        places = torch.from_numpy(lengths).to(self.device)
        rows = torch.arange(count, device=self.device)
        mask = self._step_mask(lengths, width)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, places], values[rows, :, places] = k[:, :, 0], v[:, :, 0]
            seen = keys[:count, :, :width], values[:count, :, :width]
            grouped = q.reshape(count, seen[0].shape[1], -1, q.shape[3])  # (B, K, H / K, D)
            y = F.scaled_dot_product_attention(grouped, *seen, mask)
            return y.reshape(q.shape)

        x = self._blocks(tokens.to(self.device)[:, None], places[:, None], attend)
        self.lengths[:count] = lengths + 1
        return self.head(self.model.model.norm(x[:, 0]))

    def keep(self, rows: np.ndarray) -> None:
        """Keep only these rows, moved to the front in this order."""
        longest, moved = int(self.lengths[rows].max()), np.flatnonzero(rows != np.arange(len(rows)))
        source, target = (torch.from_numpy(x).to(self.device) for x in (rows[moved], moved))
        for buffer in (self.keys, self.values):
            for layer in buffer:
                layer[target, :, :longest] = layer[source, :, :longest]
        self.count = len(rows)
        self.lengths[: self.count] = self.lengths[rows]

    def _normalized(self, layer: _Layer, qk: Tensor) -> Tensor:
        """Queries and keys (B, T, H + K, D) through the norms of heads, if the model has them."""
        if not self.config.qk_norm:
            return qk
        heads = self.config.num_attention_heads
        return torch.cat(layer.attention.normalize(qk[:, :, :heads], qk[:, :, heads:]), dim=2)

    def _step_mask(self, lengths: np.ndarray, width: int) -> Tensor | None:
        """What is added to the scores, (B, 1, 1, width); None if all rows see all columns."""
        window = self.config.sliding_window
        if lengths.min() + 1 == width and (window is None or width <= window):
            return None
        column, last = np.arange(width), lengths[:, None]
        hidden = column > last
        if window is not None:
            hidden |= column <= last - window
        mask = np.where(hidden, -np.inf, 0.0)[:, None, None]
        return torch.from_numpy(mask).to(self.device, self.keys.dtype)

    def _blocks(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the blocks on ids (B, T): (B, T, hidden)."""
        self.token_forwards += ids.numel()
        c = self.config
        heads, shared = c.num_attention_heads, c.num_key_value_heads
        x = F.embedding(ids, self.model.model.embed_tokens.weight)
        cos, sin = (table.transpose(1, 2) for table in self.model.rotary(positions, x.dtype))
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norms[0](x)).unflatten(-1, (-1, c.head_dim))  # (B, T, H+2K, D)
            v = qkv[:, :, heads + shared :]
            turned = rotate(self._normalized(layer, qkv[:, :, : heads + shared]), cos, sin)
            q, k = turned[:, :, :heads], turned[:, :, heads:]
            y = attend(number, q, k.transpose(1, 2), v.transpose(1, 2))
            x = x + layer.out(y.reshape(*x.shape[:2], -1))
            gate, up = layer.gate_up(layer.norms[1](x)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return x


def shared_beginning(prompts: Sequence[np.ndarray]) -> int:
    """Number of tokens that all prompts begin with, without the last token of any; 0 for one prompt
    and for fewer than `LEAST_SHARED`.
    """
    if len(prompts) < 2:
        return 0
    shortest = min(len(prompt) for prompt in prompts) - 1
    table = np.stack([prompt[:shortest] for prompt in prompts])
    differs = np.flatnonzero((table != table[0]).any(axis=0))
    count = int(differs[0]) if len(differs) else shortest
    return count if count >= LEAST_SHARED else 0


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Queries (B, T, H, D), keys and values (B, K, S, D) -> (B, T, H, D)."""
    shared = q.shape[2] != k.shape[1]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, mask, is_causal=causal, enable_gqa=shared
    )
    return y.transpose(1, 2)
