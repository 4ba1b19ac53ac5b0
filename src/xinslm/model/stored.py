"""One weight with the codes and scales that it is stored as."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xinslm.model.finite import all_finite
from xinslm.model.grids import Q4_0, Q8_0, Grid, decode, pack_nibbles, to_ggml, unpack_nibbles


@dataclass(frozen=True)
class StoredWeight:
    """One weight as it is stored in the folder."""

    format: str
    """'q4_0', 'q8_0', 'f16' or 'f32'."""
    shape: tuple[int, ...]
    """Shape of the dequantized weight."""
    data: Tensor
    """Codes as stored (packed uint8, or int8), or the plain tensor."""
    scales: Tensor | None
    """Float16 (rows, columns / 32); None for a plain tensor."""

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Signed codes of a weight that has them, or of its rows [start, stop): int8 (rows,
        columns).
        """
        rows = self.data[start:stop]
        return unpack_nibbles(rows) if self.format == Q4_0.name else rows

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The weight in float32, or its rows [start, stop)."""
        if self.scales is None:
            return self.data[start:stop].float()
        return decode(self.codes(start, stop), self.scales[start:stop])

    def ggml_rows(self) -> np.ndarray:
        """Codes and scales as llama.cpp's blocks, uint8 (rows, bytes), or the plain array."""
        return self.data.numpy() if self.scales is None else to_ggml(self.data, self.scales)

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, grid: Grid) -> "StoredWeight | None":
        """A weight of integer codes (rows, columns) and scales (rows, columns / 32); None if the
        grid does not hold a code, or float16 a scale, exactly.
        """
        half = scales.half()
        if not torch.equal(half.float(), scales.float()) or not all_finite(half):
            return None
        if codes.min() < grid.lowest or codes.max() > grid.highest or grid not in (Q4_0, Q8_0):
            return None
        small = codes.to(torch.int8)
        data = pack_nibbles(small) if grid is Q4_0 else small
        return cls(grid.name, tuple(codes.shape), data, half)
