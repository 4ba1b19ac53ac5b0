"""Causal attention of whole rows on a CPU, computed only where a token sees another.

`scaled_dot_product_attention` on a CPU takes as long for a row of four documents as for one, with a
mask or with `is_causal`. Here a row is cut into tiles, each some queries of a document with the
keys before them, and a tile's scores are one matrix product for all queries of a key head. The
scores are not kept: the backward pass computes them again, as in FlashAttention (arXiv:2205.14135,
section 3.1), so memory grows with the tokens of a row and not with their square.
Shapes: B rows, T tokens of a row, H query heads, K key heads, D head dimension.

    tiles = cut_into_tiles([[150, 362]], window=None, heads=9)  # once for all layers
    y = attend(q, k, v, tiles)                                  # (B, H, T, D)
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUERIES = 128
"""Queries of a tile."""
MERGED = 96
"""Tokens up to which short documents share a tile: a product of few rows is all overhead."""
SCORES = 2**21
"""Scores of a tile, if that leaves at least `FEWEST` queries: 8 MB in float32."""
FEWEST = 16
SHORT = 16
"""Tokens of a row below which the products are all overhead."""
LONG = 768
"""Tokens from which PyTorch's causal attention takes larger blocks and is as fast."""


class Tile(NamedTuple):
    """Queries `start` to `end` of a row, with the keys from `first` to `end`; all are counted as
    keys, of which the last T are the queries' own.
    """

    row: int
    first: int
    start: int
    end: int
    mask: Tensor
    """Added to the scores of the last keys: (queries, at most `end - first`)."""


def cut_into_tiles(
    lengths: Sequence[Sequence[int]], window: int | None, heads: int
) -> tuple[Tile, ...]:
    """Cut rows into tiles.

    Args:
        lengths: Of the documents of each row, in order; together T.
        window: Keys that a query sees, its own included; None for all before it.
        heads: H, which limits the number of queries of a tile.
    """
    masks: dict[tuple[int, ...], Tensor] = {}
    tiles = []
    for row, documents in enumerate(lengths):
        first = 0
        for together in _merged(documents):
            end = first + sum(together)
            tiles += _tiles(row, first, together, window, heads, masks)
            first = end
    return tuple(tiles)


def _merged(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Neighbouring documents of at most `MERGED` tokens together; longer ones alone."""
    groups: list[tuple[int, ...]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= MERGED:
            groups[-1] += (length,)
        else:
            groups.append((length,))
    return groups


def _tiles(
    row: int,
    first: int,
    lengths: tuple[int, ...],
    window: int | None,
    heads: int,
    masks: dict[tuple[int, ...], Tensor],
) -> list[Tile]:
    """Tiles of one long document or of several short ones."""
    length = sum(lengths)
    parts = 1 if len(lengths) > 1 else -(-length // _most_queries(heads, length))
    cuts = [first + length * part // parts for part in range(parts + 1)]
    tiles = []
    for start, end in pairwise(cuts):
        left = first if window is None else max(first, start - window + 1)
        reaches = window is not None and end - left > window
        width = end - left if reaches else end - start
        key = (end - start, width, *(lengths if len(lengths) > 1 else ()))
        if key not in masks:
            masks[key] = _mask(end - start, width, lengths, window)
        tiles.append(Tile(row, left, start, end, masks[key]))
    return tiles


def masked_tiles(mask: Tensor, heads: int) -> tuple[Tile, ...]:
    """Tiles for keys (S) of which the last T are the queries' own, by what is added to the scores,
    (B, T, S), which hides what comes after a query.
    """
    rows, length, keys = mask.shape
    parts = -(-length // _most_queries(heads, keys))
    cuts = [length * part // parts for part in range(parts + 1)]
    past = keys - length
    return tuple(
        Tile(row, 0, past + start, past + end, mask[row, start:end, : past + end])
        for row in range(rows)
        for start, end in pairwise(cuts)
    )


def _most_queries(heads: int, keys: int) -> int:
    return max(FEWEST, min(QUERIES, SCORES // (heads * keys)))


def _mask(queries: int, width: int, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """0 where the last `queries` of `width` tokens see a key, -inf elsewhere."""
    key = torch.arange(width)
    query = key[width - queries :, None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    if len(lengths) > 1:
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        allowed &= document[:, None] == document
    return torch.zeros(queries, width).masked_fill_(~allowed, -torch.inf)


def document_lengths(segments: Tensor) -> list[list[int]]:
    """Lengths of the runs of equal numbers in each row of (B, T)."""
    length = segments.shape[1]
    changes = segments[:, 1:] != segments[:, :-1]
    runs = []
    for row in changes:
        ends = [*(row.nonzero()[:, 0] + 1).tolist(), length]
        runs.append([end - start for start, end in pairwise([0, *ends])])
    return runs


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
    """Softmax attention: queries (B, H, T, D), keys and values (B, K, S, D) -> (B, H, T, D).

    Narrow types are computed in float32 and rounded at the end. Exact up to the order of sums.
    """
    result: Tensor = _Attend.apply(q, k, v, tiles)
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.tiles = tiles
        # under autocast, too, the products stay in float32, as those inside PyTorch's attention do
        with torch.autocast("cpu", enabled=False):
            return _mix(q, k, v, tiles)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        with torch.autocast("cpu", enabled=False):
            q, k, v = ctx.saved_tensors
            return *_gradients(q, k, v, grad, ctx.tiles), None


def _mix(q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
    y, scratch = _like_rows(q), _Scratch(q, k, tiles)
    past = k.shape[2] - q.shape[2]
    for tile in tiles:
        _, keys, weights = scratch.weights(q, k, tile)
        mixed = torch.bmm(weights, _rows(v[tile.row, :, tile.first : tile.end], len(keys)))
        asked = slice(tile.start - past, tile.end - past)
        y[tile.row, :, asked] = mixed.view(q.shape[1], -1, q.shape[3])
    return y


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, tiles: tuple[Tile, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    scratch = _Scratch(q, k, tiles)
    grad_q, past = _like_rows(q), k.shape[2] - q.shape[2]
    grad_k, grad_v = (_like_rows(x, scratch.dtype).zero_() for x in (k, v))
    for tile in tiles:
        seen = tile.row, slice(None), slice(tile.first, tile.end)
        asked = tile.row, slice(None), slice(tile.start - past, tile.end - past)
        queries, keys, weights = scratch.weights(q, k, tile)
        values, grads = _rows(v[seen], len(keys)), _rows(grad[asked], len(keys))
        grad_v[seen] += torch.bmm(weights.transpose(1, 2), grads)
        grad_scores = scratch.grad_scores(grads, values, weights)
        grad_k[seen] += torch.bmm(grad_scores.transpose(1, 2), queries)
        part = torch.bmm(grad_scores, keys).mul_(scratch.scale)
        grad_q[asked] = part.view(q.shape[1], -1, q.shape[3])
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


class _Scratch:
    """Memory for the scores of any of the tiles, used again and again: fresh memory of this size
    costs as much as the products.
    """

    def __init__(self, q: Tensor, k: Tensor, tiles: tuple[Tile, ...]) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.scale, self.heads = q.shape[3] ** -0.5, k.shape[1]
        self.past = k.shape[2] - q.shape[2]
        most = max((tile.end - tile.start) * (tile.end - tile.first) for tile in tiles)
        self._memory = torch.empty(2, most * q.shape[1], dtype=self.dtype)
        self._gradient = self._memory.new_empty(0)

    def weights(self, q: Tensor, k: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries (K, G * n, D), keys (K, m, D) and attention weights (K, G * n, m)."""
        keys = _rows(k[tile.row, :, tile.first : tile.end], self.heads)
        asked = q[tile.row, :, tile.start - self.past : tile.end - self.past]
        queries = _rows(asked, self.heads) * self.scale
        shape = len(keys), queries.shape[1], keys.shape[1]
        first, second = (memory[: math.prod(shape)].view(shape) for memory in self._memory)
        scores = torch.bmm(queries, keys.transpose(1, 2), out=first)
        n, width = tile.mask.shape
        scores.view(self.heads, -1, n, keys.shape[1])[..., -width:] += tile.mask
        return queries, keys, torch.softmax(scores, -1, out=second)

    def grad_scores(self, grads: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """Gradient of the scores, (K, G * n, m), from those of the mixed values (K, G * n, D)."""
        memory = self._memory[0][: weights.numel()].view(weights.shape)
        grad_weights = torch.bmm(grads, values.transpose(1, 2), out=memory)
        if len(self._gradient) < weights.numel():
            self._gradient = torch.empty_like(self._memory[0])
        out = self._gradient[: weights.numel()].view(weights.shape)
        return torch._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype, grad_input=out
        )


def _like_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """New memory of shape (B, H, T, D) in which a token's heads are neighbours."""
    b, h, t, d = x.shape
    return torch.empty(b, t, h, d, dtype=dtype or x.dtype, device=x.device).transpose(1, 2)


def _rows(x: Tensor, heads: int) -> Tensor:
    """(heads * G, n, D) -> (heads, G * n, D), in float32 at least."""
    return x.reshape(heads, -1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
