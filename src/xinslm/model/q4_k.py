"""llama.cpp's Q4_K: 4-bit codes in super-blocks of 256 weights, 144 bytes each (4.5 bits a weight).

    weight = d * scale * code - dmin * minimum        code in [0, 15]

Each 32 neighbours have a scale and a minimum of 6 bits, each 256 a d and a dmin of float16. Unlike
Q4_0's, the codes need not lie around zero. `fit_q4_k` chooses all of this for the least squared
error, columns weighted: first an unrounded step and offset for each block, by least squares for
several candidates' codes (llama.cpp's `make_qkx2_quants` begins so too), then d and dmin, then the
integers, each for what is rounded already. The layout is that of `block_q4_K`: d, dmin, scales and
minimums, codes.

    weight = fit_q4_k(values); weight.decode(); weight.pack()
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xinslm.model.finite import all_finite
from xinslm.model.grids import BLOCK, Grid

Q4_K = Grid("q4_k", 0, 15, 18)
SUPER_BLOCK = 256
Q4_K_BYTES = 144
"""Bytes of 256 weights."""
_BLOCKS = SUPER_BLOCK // BLOCK
_MOST = 63
"""Largest scale and minimum."""
_LEAST_D = 2.0**-24
_MARGINS = [-1.0 + 0.2 * i for i in range(11)]
"""By how much the codes of a candidate reach beyond 15, before they are clamped."""
_REFITS = 2
_DIVISORS = (63.0, 60.0, 57.0)
"""Of the largest step and offset of a super-block, to d and dmin."""
_CHUNK_WEIGHTS = 1 << 17  # a chunk stays in the CPU's caches


@dataclass(frozen=True)
class Q4K:
    """Codes, scales and minimums of a matrix."""

    codes: Tensor
    """Int8 (rows, columns) in [0, 15]."""
    scales: Tensor
    """Uint8 (rows, columns / 32) in [1, 63]."""
    minimums: Tensor
    """Uint8 (rows, columns / 32) in [0, 63]."""
    d: Tensor
    """Float16 (rows, columns / 256), above 0."""
    dmin: Tensor
    """Float16 (rows, columns / 256), not below 0."""

    grid = Q4_K
    kind = "Q4_K"

    @property
    def steps(self) -> Tensor:
        """Difference of neighbouring codes' weights, float32 (rows, columns / 32)."""
        return self.d.float().repeat_interleave(_BLOCKS, 1) * self.scales.float()

    @property
    def offsets(self) -> Tensor:
        """What is subtracted, float32 (rows, columns / 32)."""
        return self.dmin.float().repeat_interleave(_BLOCKS, 1) * self.minimums.float()

    def decode(self) -> Tensor:
        """Float32 weights (rows, columns), by llama.cpp's order of products."""
        products = self.codes.unflatten(1, (-1, BLOCK)).float() * self.steps[..., None]
        return products.sub_(self.offsets[..., None]).flatten(1)

    def pack(self) -> np.ndarray:
        """llama.cpp's blocks, uint8 (rows, columns / 256 * 144)."""
        halves = (
            torch.from_numpy(x.numpy().astype("<f2").view(np.uint8)).unflatten(1, (-1, 2))
            for x in (self.d, self.dmin)
        )
        both = (x.view(torch.uint8).unflatten(1, (-1, 2, 4)) for x in (self.scales, self.minimums))
        # of blocks 0-3 all 6 bits lie in a byte; those of 4-7 are split over its rest and a third
        (low, high), (low_min, high_min) = (x.unbind(2) for x in both)
        first, second = low | (high >> 4) << 6, low_min | (high_min >> 4) << 6
        third = (high & 15) | (high_min & 15) << 4
        codes = self.codes.view(torch.uint8).unflatten(1, (-1, _BLOCKS // 2, 2, BLOCK))
        nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4).flatten(2)
        return torch.cat((*halves, first, second, third, nibbles), dim=2).flatten(1).numpy()


def fit_q4_k(weight: Tensor, importance: Tensor | None = None) -> Q4K:
    """Quantize float32 weights (rows, columns), columns a multiple of 256, to nearest.

    `importance` (columns,), above 0, weighs the squared error of each column; None weighs all
    alike. ValueError for values that are not finite, or too large for float16's d or dmin.
    """
    if not all_finite(weight):
        raise ValueError("values that are NaN or infinite")
    if importance is None:
        importance = torch.ones(weight.shape[1])
    weights = (importance / importance.mean()).float().view(-1, 1, BLOCK)
    parts = []
    for rows in weight.split(max(_CHUNK_WEIGHTS // weight.shape[1], 1)):
        blocks = rows.T.contiguous().unflatten(0, (-1, BLOCK))
        # the largest weight becomes 1: squares of what float32 holds may overflow
        size = blocks.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        steps, offsets = _fit_blocks(blocks / size, weights)
        parts.append(_round_levels(blocks, weights, steps * size, offsets * size))
    return Q4K(*(torch.cat(kind) for kind in zip(*parts, strict=True)))


# In what follows a matrix is (blocks of a row, 32, rows), so that a sum over a block is one product
# with its columns' weights (blocks, 1, 32). What a block has one of is (blocks, 1, rows).


def _round(blocks: Tensor, steps: Tensor, offsets: Tensor) -> Tensor:
    """Nearest codes, float32, for steps above 0 and offsets."""
    return (blocks + offsets).div_(steps).round_().clamp_(0, Q4_K.highest)


def _fit_blocks(blocks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Unrounded step and offset of each block."""
    low, high = blocks.aminmax(dim=1, keepdim=True)
    low = low.clamp_(max=0)
    span = (high - low).clamp_(min=1e-12)
    best, offsets = span / Q4_K.highest, -low
    least = torch.full_like(best, torch.inf)
    sums = torch.bmm(weights, blocks), torch.bmm(weights, blocks.square())
    for margin in _MARGINS:
        codes = _round(blocks, span / (Q4_K.highest + margin), -low)
        found = _least_squares(blocks, weights, codes, sums)
        best, offsets, least = _better(found, (best, offsets, least))
    for _ in range(_REFITS):
        found = _least_squares(blocks, weights, _round(blocks, best, offsets), sums)
        best, offsets, least = _better(found, (best, offsets, least))
    return best, offsets


def _least_squares(
    blocks: Tensor, weights: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps and offsets with the least error for given codes, and that error; the offset is not
    below 0. `sums` are those of the weights and of their squares. Where all codes are equal, the
    step is not defined: not finite, or not above 0.
    """
    mass, (total, squares) = weights.sum(2, keepdim=True), sums
    first, product = torch.bmm(weights, codes), torch.bmm(weights, codes * blocks)
    second = torch.bmm(weights, codes.square_())
    determinant = mass * second - first.square()
    steps = (mass * product - first * total) / determinant
    offsets = (first * product - second * total) / determinant
    steps = torch.where(offsets < 0, product / second, steps)
    offsets.clamp_(min=0)
    error = steps * (steps * second - 2 * product - 2 * offsets * first)
    error += squares + offsets * (2 * total + offsets * mass)
    return steps, offsets, error


def _better(found: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Steps, offsets and errors of the better ones, block by block."""
    steps, _, error = found
    is_better = (steps > 0) & torch.isfinite(steps) & (error < before[2])
    return tuple(torch.where(is_better, *pair) for pair in zip(found, before, strict=True))


def _round_levels(
    blocks: Tensor, weights: Tensor, steps: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, minimums, d and dmin of rows, as in `Q4K`, for unrounded steps and offsets."""
    supers = (-1, _BLOCKS, 1)
    least, best = torch.tensor(torch.inf), [torch.tensor(0.0)] * 4
    for divisor in _DIVISORS:
        halves = [_half(x.unflatten(0, supers[:2]).amax(1) / divisor) for x in (steps, offsets)]
        halves[0].clamp_(min=_LEAST_D)
        d, dmin = (half.repeat_interleave(_BLOCKS, 0) for half in halves)
        found, error = _round_integers(blocks, weights, (steps, offsets), (d, dmin))
        error = error.unflatten(0, supers[:2]).sum(1).repeat_interleave(_BLOCKS, 0)
        pairs = zip((*found, d, dmin), best, strict=True)
        best = [torch.where(error < least, *pair) for pair in pairs]
        least = torch.minimum(error, least)
    scales, minimums, d, dmin = best
    codes = _round(blocks, d * scales, dmin * minimums).to(torch.int8).flatten(0, 1)
    scales, minimums = (x.to(torch.uint8)[:, 0].T for x in (scales, minimums))
    return (codes.T, scales, minimums, d.half()[::_BLOCKS, 0].T, dmin.half()[::_BLOCKS, 0].T)


def _half(values: Tensor) -> Tensor:
    half = values.half().float()
    if not all_finite(half):
        raise ValueError("values that no float16 scale reaches")
    return half


def _round_integers(
    blocks: Tensor,
    weights: Tensor,
    wanted: tuple[Tensor, Tensor],
    halves: tuple[Tensor, Tensor],
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Scale and minimum of each block, float32, for its d and dmin, and its weighted error. The
    minimum is the best one for the scale's codes.
    """
    d, dmin = halves
    nearest = (wanted[0] / d).round_()
    places = torch.where(dmin == 0, torch.inf, dmin)
    mass, total = weights.sum(2, keepdim=True), torch.bmm(weights, blocks)
    scales, minimums = torch.ones_like(nearest), torch.zeros_like(nearest)
    least = torch.full_like(nearest, torch.inf)
    for shift in (0, -1, 1):
        new = (nearest + shift).clamp_(1, _MOST)
        steps = d * new
        sums = torch.bmm(weights, _round(blocks, steps, wanted[1]))
        integers = ((steps * sums - total) / mass / places).round_().clamp_(0, _MOST)
        values = _round(blocks, steps, dmin * integers).mul_(steps).sub_(dmin * integers)
        error = torch.bmm(weights, values.sub_(blocks).square_())
        is_better = error < least
        scales = torch.where(is_better, new, scales)
        minimums = torch.where(is_better, integers, minimums)
        least = torch.minimum(error, least)
    return (scales, minimums), least
