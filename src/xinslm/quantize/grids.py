"""The two grids: Q4_0 and Q8_0 of llama.cpp, symmetric codes with one fp16 scale per 32 neighbours
of a row.

    weight = scale * code        Q4_0: code in [-8, 7]        Q8_0: code in [-127, 127]

A scale is rounded to what is stored before any code is chosen, so codes are nearest for the stored
scale. Stored scales have at most 8 significant bits (exact in bfloat16 as well as float16: no
loader changes them) and stay in float16's normal range. Measured on the linears of a 5.8M model
this costs 0.02 % of the squared error. Q4_0's scale may be negative: its code range reaches one
step further down, and the largest weight is put there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65280.0
_SEARCH_DIVISORS = [6.0 + 0.1 * i for i in range(41)]
_CHUNK_BLOCKS = 4096


@dataclass(frozen=True)
class Grid:
    """Integer codes that a block may hold."""

    name: str
    """llama.cpp's name, lower case."""
    lowest: int
    highest: int
    block_bytes: int
    """Bytes of 32 weights in a GGUF file, scale included."""

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scale included."""
        return self.block_bytes * 8 / BLOCK


Q4_0 = Grid("q4_0", -8, 7, 18)
Q8_0 = Grid("q8_0", -127, 127, 34)
GRIDS = {grid.name: grid for grid in (Q4_0, Q8_0)}


def storable(scales: Tensor, bf16_exact: bool = True) -> Tensor:
    """Round float32 scales to values float16 holds as normal numbers, and bfloat16 too unless told
    otherwise.

    Magnitudes outside [2^-14, 65280] are clamped; zero becomes 2^-14, so that dividing by a scale
    is always safe.
    """
    magnitudes = scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    rounded = (magnitudes.bfloat16() if bf16_exact else magnitudes.half()).float()
    return torch.where(scales < 0, -rounded, rounded)


def encode(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Nearest codes, int8 (rows, columns), of weights for stored scales (rows, columns / 32)."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    return (
        (blocks / scales[..., None])
        .round_()
        .clamp_(grid.lowest, grid.highest)
        .to(torch.int8)
        .flatten(-2)
    )


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 weights of codes (rows, columns) and scales (rows, columns / 32): one product
    each.
    """
    return (codes.unflatten(-1, (-1, BLOCK)).float() * scales.float()[..., None]).flatten(-2)


def fit_scales(
    weight: Tensor,
    grid: Grid,
    importance: Tensor | None = None,
    search: bool = True,
    bf16_exact: bool = True,
) -> Tensor:
    """Choose storable scales, float32 (rows, columns / 32), for float32 weights (rows, columns).

    Q8_0 takes the largest magnitude over 127. Q4_0 tries 41 multiples of the largest weight with
    both signs and keeps the one with the least squared error, each column weighted by `importance`
    (columns,); without `search` it takes the largest weight over -8.
    """
    blocks = weight.reshape(-1, BLOCK)
    position = blocks.abs().argmax(dim=1, keepdim=True)
    extreme = blocks.gather(1, position)[:, 0]  # signed value of largest magnitude
    shape = (weight.shape[0], weight.shape[1] // BLOCK)
    if grid is Q8_0:
        return storable(extreme.abs() / 127, bf16_exact).view(shape)
    if not search:
        return storable(extreme / -8, bf16_exact).view(shape)
    weights = (
        torch.ones(shape[1], BLOCK) if importance is None else importance.float().view(-1, BLOCK)
    )
    best = torch.empty(len(blocks))
    for start in range(0, len(blocks), _CHUNK_BLOCKS):  # a chunk stays in the processor's cache
        rows = torch.arange(start, min(start + _CHUNK_BLOCKS, len(blocks)))
        part, part_weights = blocks[rows], weights[rows % shape[1]]
        best[rows] = _search(part, extreme[rows], part_weights, bf16_exact)
    return best.view(shape)


def _search(blocks: Tensor, extreme: Tensor, weights: Tensor, bf16_exact: bool) -> Tensor:
    """Scale of least weighted squared error for each of (n, 32) blocks among the candidates."""
    best = storable(extreme / -8, bf16_exact)
    least = torch.full_like(best, torch.inf)
    for divisor in _SEARCH_DIVISORS:
        for sign in (-1.0, 1.0):
            scales = storable(extreme * (sign / divisor), bf16_exact)
            error = (blocks / scales[:, None]).round_().clamp_(Q4_0.lowest, Q4_0.highest)
            error = error.mul_(scales[:, None]).sub_(blocks).square_().mul_(weights).sum(dim=1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scales, best)
    return best


@dataclass(frozen=True)
class RangeReport:
    """How well a tensor's magnitudes fit float16 scales."""

    fits: bool
    """False where a block is too large for any scale, or where blocks too small for one matter."""
    small_blocks: int
    """Blocks, not all zero, that the smallest scale resolves only coarsely."""


def check_range(weight: Tensor, grid: Grid) -> RangeReport:
    """Say whether clamped scales can hold a weight matrix.

    A block below the smallest scale loses at most half a step of 2^-14 in each weight. That is
    tolerated while the sum of it is under 1e-3 of the tensor's energy, a fraction of what 4-bit
    rounding costs anyway.
    """
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    steps = max(-grid.lowest, grid.highest)
    if bool((largest > steps * LARGEST_SCALE).any()):
        return RangeReport(False, 0)
    small = (largest < steps * SMALLEST_SCALE) & (largest > 0)
    energy = (
        blocks[small]
        .double()
        .square()
        .sum(dim=1)
        .clamp(max=BLOCK * (SMALLEST_SCALE / 2) ** 2)
        .sum()
    )
    return RangeReport(bool(energy <= 1e-3 * blocks.double().square().sum()), int(small.sum()))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] (rows, columns) into uint8 (rows, columns / 2), Q4_0's order.

    Byte j of a block holds code j in its low half and code j + 16 in its high half, 8 added to
    each.
    """
    halves = (codes.unflatten(-1, (-1, 2, BLOCK // 2)) + 8).to(torch.uint8)
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).flatten(-2)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`: uint8 (rows, columns / 2) -> int8 (rows, columns)."""
    halves = packed.unflatten(-1, (-1, BLOCK // 2))
    return (torch.stack((halves & 15, halves >> 4), dim=-2).to(torch.int8) - 8).flatten(-3)


def to_ggml(stored_codes: Tensor, scales: Tensor) -> np.ndarray:
    """Join codes as stored and float16 scales into llama.cpp's blocks, uint8 (rows, bytes)."""
    rows, groups = scales.shape
    codes = stored_codes.numpy().view(np.uint8).reshape(rows, groups, -1)
    heads = scales.numpy().astype("<f2").view(np.uint8).reshape(rows, groups, 2)
    return np.concatenate((heads, codes), axis=2).reshape(rows, -1)
