"""llama.cpp's Q6_K: 6-bit codes in super-blocks of 256 weights, 210 bytes each.

    weight = d * scale * code        code in [-32, 31], scale int8 for each 16 weights, d float16

Scales are searched for the least squared error. `d` is rounded first, then the scales are chosen
for it, then the codes, so each is nearest for what is stored. The layout is that of llama.cpp's
`block_q6_K`: low 4 bits, high 2 bits, scales, d.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xinslm.model.finite import all_finite

SUPER_BLOCK = 256
Q6_K_BYTES = 210
"""Bytes of 256 weights."""
_LOWEST, _HIGHEST = -32, 31
_GROUP = 16
_DIVISORS = [27.5 + 0.5 * i for i in range(13)]
_CHUNK_BLOCKS = 2048  # a chunk stays in the CPU's caches


@dataclass(frozen=True)
class Q6K:
    """Codes and scales of weights in super-blocks."""

    codes: Tensor
    """Int8 (super-blocks, 16, 16)."""
    scales: Tensor
    """Int8 (super-blocks, 16)."""
    d: Tensor
    """Float16 (super-blocks,)."""

    def decode(self) -> Tensor:
        """Float32 weights (super-blocks, 256), by llama.cpp's order of products."""
        steps = self.d.float()[:, None] * self.scales.float()
        return (steps[..., None] * self.codes.float()).flatten(1)

    def pack(self) -> np.ndarray:
        """llama.cpp's blocks, uint8 (super-blocks, 210)."""
        codes = (self.codes.flatten(1).to(torch.int16) - _LOWEST).to(torch.uint8)
        low, high = (codes & 15).view(-1, 2, 2, 64), (codes >> 4).view(-1, 2, 4, 32)
        lows = low[:, :, 0] | low[:, :, 1] << 4
        highs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
        d = torch.from_numpy(self.d.numpy().astype("<f2").view(np.uint8).reshape(-1, 2))
        parts = (lows.flatten(1), highs.flatten(1), self.scales.view(torch.uint8), d)
        return torch.cat(parts, dim=1).numpy()


def quantize_q6_k(weight: Tensor) -> Q6K:
    """Quantize float32 weights, their number a multiple of 256.

    ValueError for values that are not finite, or too large for any scale.
    """
    blocks = weight.reshape(-1, SUPER_BLOCK // _GROUP, _GROUP)
    if not all_finite(blocks):
        raise ValueError("values that are NaN or infinite")
    parts = [_quantize(chunk) for chunk in blocks.split(_CHUNK_BLOCKS)]
    return Q6K(*(torch.cat(kind) for kind in zip(*parts, strict=True)))


def _quantize(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and d of blocks (super-blocks, 16, 16), as in `Q6K`."""
    wanted = _best_steps(blocks)
    largest = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))
    if (largest.abs() > 122 * torch.finfo(torch.float16).max).any():
        raise ValueError("values that no float16 scale reaches")
    least = torch.full((len(blocks),), torch.inf)
    scales = torch.zeros_like(wanted, dtype=torch.int8)
    d = torch.zeros(len(blocks), dtype=torch.float16)
    for divisor in (-128, -127, -122):
        half = (largest / divisor).half()
        chosen, error = _best_scales(blocks, wanted, half.float())
        better = error < least
        least[better], d[better] = error[better], half[better, 0]
        scales[better] = chosen[better].to(torch.int8)
    codes = _round(blocks, d.float()[:, None] * scales.float()).to(torch.int8)
    return codes, scales, d


def _best_steps(blocks: Tensor) -> Tensor:
    """Unrounded steps (super-blocks, 16) with the least squared error of those that the signed
    largest weight of a group suggests.
    """
    low, high = blocks.aminmax(dim=2)
    extreme = torch.where(high >= -low, high, low)
    best, most = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for divisor in _DIVISORS:
        codes = _round(blocks, extreme / -divisor)
        product, norm = (blocks * codes).sum(2), codes.square_().sum(2).clamp_(min=1)
        gain = product.square() / norm  # of the squared error, by the best step for these codes
        best = torch.where(gain > most, product / norm, best)
        most = torch.maximum(gain, most)
    return best


def _best_scales(blocks: Tensor, wanted: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Integer scales (super-blocks, 16) for d (super-blocks, 1), and the squared error of each
    super-block.
    """
    nearest = torch.where(d == 0, 0, wanted / d).round().nan_to_num(0, 127, -128)
    best, least = torch.zeros_like(nearest), blocks.square().sum(2)
    for shift in (0, -1, 1):
        scales = (nearest + shift).clamp(-128, 127)
        steps = d * scales
        error = (blocks - _round(blocks, steps) * steps[..., None]).square().sum(2)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best, least.sum(1)


def _round(blocks: Tensor, steps: Tensor) -> Tensor:
    """Nearest codes, float32, for steps (super-blocks, 16); 0 for a step of 0."""
    quotients = blocks / torch.where(steps == 0, torch.inf, steps)[..., None]
    return quotients.round_().clamp_(_LOWEST, _HIGHEST)
