"""Codes of the quantized folder in the layouts of other runtimes, without rounding again.

Codes are stored in llama.cpp's nibble order; other runtimes put neighbours of a row next to each
other, the first one in the lowest bits of a 32-bit word, as unsigned numbers: each code plus half
of their range.
"""

import torch
from torch import Tensor

from xinslm.model.grids import unpack_nibbles
from xinslm.model.source import ModelSource
from xinslm.model.stored import StoredWeight

BITS = {"q4_0": 4, "q8_0": 8}
"""Bits of a code by format; the other formats are not quantized."""


def stored_weight(model: ModelSource, name: str, shape: tuple[int, ...]) -> StoredWeight:
    """A weight with its codes, or in float32 if it has none."""
    weight = model.stored(name)
    if weight is None:
        return StoredWeight("f32", shape, model.rows(name, shape), None)
    return weight


def codes(weight: StoredWeight) -> Tensor:
    """Signed codes, int8 (rows, columns)."""
    return unpack_nibbles(weight.data) if BITS[weight.format] == 4 else weight.data


def words(weight: StoredWeight) -> Tensor:
    """Unsigned codes, int32 (rows, columns * bits / 32)."""
    bits = BITS[weight.format]
    unsigned = (codes(weight).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)


def by_input(weight: StoredWeight) -> Tensor:
    """Unsigned codes in words along the input, int32 (columns * bits / 32, rows)."""
    return words(weight).T.contiguous()
