"""Grids of llama.cpp, symmetric codes with one fp16 scale per 32 neighbours of a row: Q4_0 and Q8_0
of quantized folders, and Q5_0 of GGUF files alone.

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
_CANDIDATES = 41
_CHUNK_BLOCKS = 16_384  # a chunk stays in the CPU's caches


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
Q5_0 = Grid("q5_0", -16, 15, 22)
Q8_0 = Grid("q8_0", -127, 127, 34)
GRIDS = {grid.name: grid for grid in (Q4_0, Q8_0)}
"""Those of quantized folders, by name."""


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
    values = codes.unflatten(-1, (-1, BLOCK)).to(torch.float32, copy=True)
    return values.mul_(scales.float()[..., None]).flatten(-2)


def largest_scales(weight: Tensor) -> Tensor:
    """Storable Q4_0 scales, float32 (rows, columns / 32), that give each block's largest weight the
    code -8: llama.cpp's rule. A matrix that is decoded from them has the same scales again.
    """
    low, high = weight.float().unflatten(-1, (-1, BLOCK)).aminmax(dim=-1)
    return storable(torch.where(high >= -low, high, low) / -8)


def fit_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """Choose storable scales, float32 (rows, columns / 32), for float32 weights (rows, columns).

    Q8_0 takes the largest magnitude over 127, others the result of `search_scales` with each column
    weighted by `importance` (columns,). Importances (n, columns) give (n, rows, columns / 32), for
    little more than the time of one.
    """
    if grid is Q8_0:
        return storable(weight.unflatten(1, (-1, BLOCK)).abs().amax(-1) / 127)
    if importance is None:
        importance = torch.ones(weight.shape[1])
    weights = importance.float().view(-1, weight.shape[1] // BLOCK, BLOCK).transpose(0, 1)
    best = torch.empty(weights.shape[1], len(weight), len(weights))
    for top in range(0, len(weight), _CHUNK_BLOCKS):
        rows = weight[top : top + _CHUNK_BLOCKS]
        step = max(_CHUNK_BLOCKS // len(rows), 1)
        for start in range(0, len(weights), step):
            stop = min(start + step, len(weights))
            blocks = rows[:, start * BLOCK : stop * BLOCK].T.contiguous()
            scales = search_scales(blocks.unflatten(0, (-1, BLOCK)), weights[start:stop], grid)
            best[:, top : top + len(rows), start:stop] = scales.permute(1, 2, 0)
    return best.view(*importance.shape[:-1], *best.shape[1:])


def search_scales(blocks: Tensor, weights: Tensor, grid: Grid = Q4_0) -> Tensor:
    """Choose the scales with the least weighted squared error for blocks (groups, 32, rows);
    weights (groups, n, 32) give scales (groups, n, rows). For Q4_0 and Q5_0.

    Candidates are 41 fractions of the signed largest weight of a block, with both signs.
    """
    low, high = blocks.aminmax(dim=1, keepdim=True)
    extreme = torch.where(high >= -low, high, low)
    wanted, nearest, error = (torch.empty_like(blocks) for _ in range(3))
    best = storable(extreme / grid.lowest).repeat(1, weights.shape[1], 1)
    least = torch.full_like(best, torch.inf)
    smallest = -grid.lowest - 2.0
    for divisor in (smallest + 0.1 * i for i in range(_CANDIDATES)):
        scale = storable(extreme * (-1 / divisor))
        torch.div(blocks, scale, out=wanted)
        torch.round(wanted, out=nearest)
        # of a scale of the other sign all codes are negated, and so is their range; below the
        # highest code + .5 none is clamped, and both signs have the same error
        for sign in (1, -1) if divisor > grid.highest + 0.45 else (1,):
            limits = sorted((sign * grid.lowest, sign * grid.highest))
            torch.clamp(nearest, *limits, out=error).sub_(wanted).square_()
            sums = torch.bmm(weights, error).mul_(scale.square())
            lesser = torch.minimum(sums, least)
            best.lerp_(sign * scale, sums.lt_(least))  # exact for 0 and 1, and faster than `where`
            least = lesser
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
    if not small.any():
        return RangeReport(True, 0)
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


def pack_q5_0(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-16, 15] (rows, columns) into uint8 (rows, columns / 32 * 20) in Q5_0's
    order: the fifth bits of 32 codes, then the others as in Q4_0.
    """
    stored = (codes - Q5_0.lowest).to(torch.uint8).unflatten(-1, (-1, 4, 8))
    places = 2 ** torch.arange(8, dtype=torch.uint8)
    fifth = ((stored >> 4) * places).sum(-1, dtype=torch.uint8)
    halves = (stored.flatten(-2) & 15).unflatten(-1, (2, BLOCK // 2))
    low = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return torch.cat((fifth, low), dim=-1).flatten(-2)
