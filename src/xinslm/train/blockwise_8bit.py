"""Optimizer states in 8 bits: blocks of 256 numbers, each scaled by its largest value (cf.
Dettmers, arXiv:2110.02861).

The codes are linear in the square root of a first moment and in the fourth root of a second moment.
Both then cover the same range in units of the gradient, with most codes near zero. They are a
closed form instead of the paper's table: a few elementwise operations, the same on cpu, cuda and
mps. A second moment above zero never becomes zero, which would make the step unbounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale."""
_TINY = torch.finfo(torch.float32).tiny


def num_blocks(count: int) -> int:
    """Scales that `count` numbers need."""
    return -(-count // BLOCK)


def _blocks(values: Tensor) -> Tensor:
    """(n,) -> (blocks, BLOCK), the last one filled with zeros."""
    return F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def encode_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (n,) float32 -> codes (n,) int8 and scales (blocks,) float32: x ~ scale * sign(c) *
    (c / 127)^2.
    """
    blocks = _blocks(values)
    scales = blocks.abs().amax(dim=1).clamp_min_(_TINY)
    ratios = blocks / scales[:, None]
    codes = ratios.abs().sqrt_().mul_(127).round_().copysign_(ratios)
    return codes.to(torch.int8).view(-1)[: len(values)], scales


def decode_signed(codes: Tensor, scales: Tensor) -> Tensor:
    """Undo `encode_signed`: (n,) int8 and (blocks,) -> (n,) float32."""
    roots = _blocks(codes.float())
    return (roots * roots.abs()).mul_(scales[:, None] / 127**2).view(-1)[: len(codes)]


def encode_positive(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (n,) float32 >= 0 -> codes (n,) uint8 and scales (blocks,) float32: x ~ scale * (c /
    255)^4.
    """
    blocks = _blocks(values)
    scales = blocks.amax(dim=1).clamp_min_(_TINY)
    codes = (blocks / scales[:, None]).sqrt_().sqrt_().mul_(255).round_()
    codes = torch.maximum(codes, (blocks > 0).float())
    return codes.to(torch.uint8).view(-1)[: len(values)], scales


def decode_positive(codes: Tensor, scales: Tensor) -> Tensor:
    """Undo `encode_positive`: (n,) uint8 and (blocks,) -> (n,) float32."""
    squares = _blocks(codes.float()).div_(255).square_()
    return squares.square_().mul_(scales[:, None]).view(-1)[: len(codes)]
