"""A `Transformer` over rows that branch: texts with common beginnings, each token computed once.

A row holds the tokens of a tree in depth-first order, so a token's descendants follow it directly:
token j is an ancestor of token i if j <= i < ends[j]. Attention is limited to ancestors (tree
attention, Miao et al., arXiv:2305.09781, section 4.2); positions are depths in the tree. All rows
may continue one prefix, whose keys and values are computed once. Logits equal those of each text
alone up to rounding. Shapes: B rows, T tokens of a row, P tokens of the prefix, H query heads, K
key heads, D head dimension.

    hidden, prefix = read_prefix(model, ids, None)             # (P, hidden)
    hidden = read_rows(model, tokens, positions, ends, prefix)  # (B, T, hidden)
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.model.attention import SHORT, attend, masked_tiles
from xinslm.model.transformer import Attention, Mask, Transformer


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens that rows continue, a tensor (1, K, P, D) for each layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """P, its number of tokens."""
        return self.keys[0].shape[2]


class _Layers:
    """Attends to the prefix and the rows; keeps their keys and values if asked to."""

    def __init__(self, mask: Mask, prefix: Prefix | None, keep: bool) -> None:
        self.mask, self.prefix, self.keep = mask, prefix, keep
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(
        self, layer: int, attention: Attention, x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        b, t, _ = x.shape
        q, k, v = attention.project(x, cos, sin)
        if self.prefix is not None:
            past = self.prefix.keys[layer], self.prefix.values[layer]
            k, v = (
                torch.cat((old.expand(b, -1, -1, -1), new), dim=2)
                for old, new in zip(past, (k, v), strict=True)
            )
        if self.keep:
            self.keys.append(k)
            self.values.append(v)
        return attention.o_proj(_attention(q, k, v, self.mask).transpose(1, 2).reshape(b, t, -1))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Queries (B, H, T, D), keys and values (B, K, S, D) -> (B, H, T, D); causal without a mask."""
    b, heads, t, size = q.shape
    if isinstance(mask, tuple):
        return attend(q, k, v, mask)
    if mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=t > 1, enable_gqa=heads != k.shape[1]
        )
    groups = heads // k.shape[1]
    grouped = q.reshape(b, k.shape[1], groups * t, size)  # the heads of a key head, one after one
    y = F.scaled_dot_product_attention(grouped, k, v, mask.repeat(1, 1, groups, 1))
    return y.reshape(b, heads, t, size)


def _mask(model: Transformer, positions: Tensor, ends: Tensor, past: int) -> Mask:
    """What limits attention: tiles on a CPU, else what is added to the scores, (B, 1, T, P + T)."""
    window, dtype = model.config.sliding_window, model.model.embed_tokens.weight.dtype
    t = ends.shape[1]
    order = torch.arange(t, device=ends.device)
    allowed = (order <= order[:, None]) & (order[:, None] < ends[:, None, :])  # (B, T, T)
    allowed = F.pad(allowed, (past, 0), value=True)
    if window is not None:
        columns = torch.arange(past, device=ends.device).expand(len(ends), past)
        keys = torch.cat((columns, positions), dim=1)
        allowed &= keys[:, None, :] > positions[:, :, None] - window
    mask = torch.zeros(allowed.shape, dtype=dtype, device=ends.device)
    mask = mask.masked_fill_(~allowed, -torch.inf)
    if mask.device.type != "cpu" or ends.shape[1] < SHORT:
        return mask[:, None]
    return masked_tiles(mask, model.config.num_attention_heads)


def _run(model: Transformer, ids: Tensor, positions: Tensor, layers: _Layers) -> Tensor:
    x = F.embedding(ids, model.model.embed_tokens.weight)
    cos, sin = model.rotary(positions, x.dtype)
    block: Any
    for number, block in enumerate(model.model.layers):
        x = x + layers.attend(number, block.self_attn, block.input_layernorm(x), cos, sin)
        x = x + block.mlp(block.post_attention_layernorm(x))
    hidden: Tensor = model.model.norm(x)
    return hidden


@torch.inference_mode()
def read_prefix(model: Transformer, ids: Tensor, prefix: Prefix | None) -> tuple[Tensor, Prefix]:
    """Append ids (T,) to a prefix: their hidden states (T, hidden), and the longer prefix."""
    past = prefix.length if prefix is not None else 0
    positions = torch.arange(past, past + len(ids), device=ids.device)[None]
    if past:
        ends = torch.full((1, len(ids)), len(ids), device=ids.device)
        mask = _mask(model, positions, ends, past)
    else:
        mask = model.attended(ids[None], None)
    layers = _Layers(mask, prefix, keep=True)
    hidden = _run(model, ids[None], positions, layers)[0]
    return hidden, Prefix(layers.keys, layers.values)


@torch.inference_mode()
def read_rows(
    model: Transformer, tokens: Tensor, positions: Tensor, ends: Tensor, prefix: Prefix | None
) -> Tensor:
    """Hidden states (B, T, hidden) of rows that continue `prefix`.

    Args:
        model: In evaluation mode.
        tokens: Ids (B, T) int64, each row in depth-first order, padded on the right.
        positions: Depths (B, T) int64, counted with the prefix.
        ends: Where each token's descendants end in the row, (B, T) int64; T for pads.
        prefix: Keys and values of what comes before all rows.
    """
    past = prefix.length if prefix is not None else 0
    is_causal = not past and bool((ends >= tokens.shape[1]).all())
    mask = model.attended(tokens, None) if is_causal else _mask(model, positions, ends, past)
    return _run(model, tokens, positions, _Layers(mask, prefix, keep=False))
