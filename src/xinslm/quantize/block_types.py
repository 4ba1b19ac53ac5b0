"""One weight matrix in a type of llama.cpp that fits its width: Q4_K, or Q5_0 where rows are no
multiple of 256, as llama.cpp's own quantizer does.

With the factor of its inputs' Hessian this is GPTAQ (`gptq.py`): scales and minimums are fitted
with each column weighted by 1 / diag(H^-1), then codes are chosen column by column for these, each
error moved onto the remaining columns. Without it, or if that has the larger layer loss, the type
is fitted to the weights alone and each code is the nearest.

    fitted = fit_linear(weight, block_type(weight.shape[1]), factor)
    fitted.coded.pack()  # llama.cpp's blocks
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from xinslm.model.finite import all_finite
from xinslm.model.grids import (
    BLOCK,
    Q5_0,
    Grid,
    check_range,
    decode,
    encode,
    fit_scales,
    pack_q5_0,
    to_ggml,
)
from xinslm.model.q4_k import Q4K, SUPER_BLOCK, fit_q4_k
from xinslm.quantize.gptq import Factor, feed_back_errors, layer_loss

_MAX_ERROR = 0.3
"""Squared error over the squared weights beyond which the scales must have failed: 4 bits leave .01
of heavy-tailed weights."""


@dataclass(frozen=True)
class Q50:
    """Codes and scales of a matrix on Q5_0, with the interface of `Q4K`."""

    codes: Tensor
    """Int8 (rows, columns) in [-16, 15]."""
    steps: Tensor
    """Scales, float32 that float16 represents exactly, (rows, columns / 32)."""
    grid: ClassVar[Grid] = Q5_0
    kind: ClassVar[str] = "Q5_0"
    offsets: ClassVar[None] = None

    def decode(self) -> Tensor:
        """Float32 weights (rows, columns)."""
        return decode(self.codes, self.steps)

    def pack(self) -> np.ndarray:
        """llama.cpp's blocks, uint8 (rows, columns / 32 * 22)."""
        return to_ggml(pack_q5_0(self.codes), self.steps.half())


Coded = Q4K | Q50


@dataclass(frozen=True)
class Fitted:
    """A matrix in a type, and how its codes were chosen."""

    coded: Coded
    method: Literal["gptq", "rtn"]
    loss: float | None = None
    """Mean squared output error per token, tr(E H E^T), as in `QuantizedLinear`; None without a
    Hessian."""
    rtn_loss: float | None = None
    """The same for rounding to nearest with scales fitted without inputs."""


def block_type(columns: int) -> type[Coded] | None:
    """The type for rows of a width; None if no block fits."""
    if columns % SUPER_BLOCK == 0:
        return Q4K
    return Q50 if columns % BLOCK == 0 else None


def fit_nearest(weight: Tensor, kind: type[Coded], importance: Tensor | None = None) -> Coded:
    """Fit a type to float32 weights (rows, columns), the error of each column weighted by
    `importance` (columns,), and round to nearest. ValueError if float16 does not hold the scales.
    """
    if kind is Q4K:
        found: Coded = fit_q4_k(weight, importance)
        error = (found.decode() - weight).double().square().sum()
        if error > _MAX_ERROR * weight.double().square().sum():
            raise ValueError("values that are too small for a float16 scale")
        return found
    if not all_finite(weight) or not check_range(weight, Q5_0).fits:
        raise ValueError("values that no float16 scale holds")
    scales = fit_scales(weight, Q5_0, importance)
    return Q50(encode(weight, scales, Q5_0), scales)


def fit_linear(weight: Tensor, kind: type[Coded], factor: Factor | None) -> Fitted:
    """Choose codes for float32 weights (rows, columns); errors as in `fit_nearest`."""
    nearest = fit_nearest(weight, kind)
    if factor is None:
        return Fitted(nearest, "rtn")
    wanted = factor.aim(weight)
    fed_back = fit_nearest(wanted, kind, factor.importance)
    codes = feed_back_errors(wanted, fed_back.steps, factor, fed_back.grid, fed_back.offsets)
    fed_back = replace(fed_back, codes=codes)
    loss, rtn_loss = (
        layer_loss(wanted, found.decode(), factor.hessian) for found in (fed_back, nearest)
    )
    if loss <= rtn_loss:
        return Fitted(fed_back, "gptq", loss, rtn_loss)
    return Fitted(nearest, "rtn", rtn_loss, rtn_loss)
