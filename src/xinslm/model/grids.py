"""The two grids: Q4_0 and Q8_0 of llama.cpp, symmetric codes with one fp16 scale per 32 neighbours
of a row.

    weight = scale * code        Q4_0: code in [-8, 7]        Q8_0: code in [-127, 127]

Scales are rounded before codes are chosen, so codes are nearest for the stored scale. Stored scales
have at most 8 significant bits and stay in float16's normal range, so that bfloat16 and float16
loaders read the same value; on the linears of a 5.8M model this costs 0.02 % of the squared error.
Q4_0's scale may be negative: the code range is one step longer below 0, and the largest weight is
placed there.
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
    """Range of integer codes and their storage."""

    name: str
    """llama.cpp's name, lower case."""
    lowest: int
    highest: int
    block_bytes: int
    """Bytes of 32 weights in a GGUF file, including the scale."""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, including the scale."""
        return self.block_bytes * 8 / BLOCK


Q4_0 = Grid("q4_0", -8, 7, 18)
Q8_0 = Grid("q8_0", -127, 127, 34)
GRIDS = {grid.name: grid for grid in (Q4_0, Q8_0)}


def storable(scales: Tensor) -> Tensor:
    """Round float32 scales to values that bfloat16 and float16 (as normal numbers) hold exactly.

    Magnitudes outside [2^-14, 65280] are clamped; zero becomes 2^-14, so dividing by a scale is
    always safe.
    """
    rounded = scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).bfloat16().float()
    return torch.where(scales < 0, -rounded, rounded)


def encode(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Nearest int8 codes (rows, columns) of weights for stored scales (rows, columns / 32)."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    codes = (blocks / scales[..., None]).round_().clamp_(grid.lowest, grid.highest)
    return codes.to(torch.int8).flatten(-2)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 weights of codes (rows, columns) and scales (rows, columns / 32)."""
    return (codes.unflatten(-1, (-1, BLOCK)).float() * scales.float()[..., None]).flatten(-2)


def fit_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """Choose storable scales, float32 (rows, columns / 32), for float32 weights (rows, columns).

    Q8_0 takes the largest magnitude over 127, Q4_0 the result of `search_scales` with each column
    weighted by `importance` (columns,).
    """
    blocks = weight.reshape(-1, BLOCK)
    position = blocks.abs().argmax(dim=1, keepdim=True)
    extreme = blocks.gather(1, position)[:, 0]  # signed value of largest magnitude
    shape = (weight.shape[0], weight.shape[1] // BLOCK)
    if grid is Q8_0:
        return storable(extreme.abs() / 127).view(shape)
    weights = torch.ones(weight.shape[1]) if importance is None else importance.float()
    weights = weights.view(-1, BLOCK)
    best = torch.empty(len(blocks))
    for start in range(0, len(blocks), _CHUNK_BLOCKS):  # a chunk fits the CPU cache
        rows = torch.arange(start, min(start + _CHUNK_BLOCKS, len(blocks)))
        part, part_weights = blocks[rows], weights[rows % shape[1]]
        best[rows] = search_scales(part, extreme[rows], part_weights)
    return best.view(shape)


def search_scales(blocks: Tensor, extreme: Tensor, weights: Tensor) -> Tensor:
    """Choose the Q4_0 scale with the least weighted squared error for each of (n, 32) blocks.

    Candidates are 41 fractions of `extreme` (n,), the signed largest weight, with both signs.
    """
    best = storable(extreme / -8)
    least = torch.full_like(best, torch.inf)
    for divisor in _SEARCH_DIVISORS:
        for sign in (-1.0, 1.0):
            scales = storable(extreme * (sign / divisor))
            error = (blocks / scales[:, None]).round_().clamp_(Q4_0.lowest, Q4_0.highest)
            error = error.mul_(scales[:, None]).sub_(blocks).square_().mul_(weights).sum(dim=1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scales, best)
    return best


@dataclass(frozen=True)
class RangeReport:
    """How well a tensor's magnitudes fit float16 scales."""

    fits: bool
    """False if a block is too large for any scale, or if blocks too small for one matter."""
    small_blocks: int
    """Nonzero blocks that the smallest scale resolves only coarsely."""


def check_range(weight: Tensor, grid: Grid) -> RangeReport:
    """Report whether clamped scales can represent a weight matrix.

    A block below the smallest scale loses at most half a step of 2^-14 per weight. This is accepted
    while the sum is below 1e-3 of the tensor's energy, a fraction of the cost of 4-bit rounding.
    """
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    steps = max(-grid.lowest, grid.highest)
    if bool((largest > steps * LARGEST_SCALE).any()):
        return RangeReport(False, 0)
    small = (largest < steps * SMALLEST_SCALE) & (largest > 0)
    energy = blocks[small].double().square().sum(dim=1)
    energy = energy.clamp(max=BLOCK * (SMALLEST_SCALE / 2) ** 2).sum()
    return RangeReport(bool(energy <= 1e-3 * blocks.double().square().sum()), int(small.sum()))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] (rows, columns) into uint8 (rows, columns / 2) in Q4_0's order.

    Byte j of a block holds code j in its low half and code j + 16 in its high half, each plus 8.
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
