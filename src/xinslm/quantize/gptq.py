"""GPTQ (Frantar et al., arXiv:2210.17323) on llama.cpp's Q4_0 grid.

Columns are rounded one after another; each column's error is moved onto the remaining columns by
the inverse Hessian of the layer's squared output error. Scales are fixed beforehand from the
original weights ("static groups"), so columns can be rounded in order of importance ("act-order").
If rounding to nearest has the smaller layer loss, its result is kept instead.

    hessian = Hessian(columns); hessian.add(inputs)
    result = quantize_weight(weight, factorise(hessian.mean()))
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xinslm.model.grids import BLOCK, Q4_0, decode, encode, fit_scales

DAMPING_LADDER = (0.01, 0.02, 0.05, 0.1)
_CHUNK_ROWS = 2048
_LAZY_COLUMNS = 128


class Hessian:
    """Sum of X^T X over a layer's inputs: chunks are computed in float32 and summed in float64."""

    def __init__(self, columns: int) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float64)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs (tokens, columns), without padding."""
        for chunk in inputs.float().split(_CHUNK_ROWS):
            self.sum += chunk.T @ chunk
        self.tokens += len(inputs)

    def mean(self) -> Tensor:
        """Mean over tokens, float64 (columns, columns)."""
        return self.sum / max(self.tokens, 1)


@dataclass(frozen=True)
class Factor:
    """Factorization shared by all weights that read the same inputs."""

    hessian: Tensor
    """Mean of X^T X, float32 (columns, columns)."""
    order: Tensor
    """Columns in rounding order, int64."""
    upper: Tensor
    """Upper Cholesky factor of the damped inverse Hessian, float32, in `order`."""
    importance: Tensor
    """1 / diag(H^-1), float32 (columns,): cost of an error that later columns compensate."""
    damping: float
    """Fraction of the mean diagonal that was added to make the Hessian invertible."""


def rounding_order(diagonal: Tensor) -> Tensor:
    """Order columns (int64) by falling diagonal of the Hessian, ties by position ("act-order")."""
    return diagonal.argsort(descending=True, stable=True)


def factorise(hessian: Tensor) -> Factor | None:
    """Invert and factorize a float64 Hessian (columns, columns); None if no damping suffices."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not torch.isfinite(hessian).all() or mean <= 0:
        return None
    order = rounding_order(diagonal)
    ordered = hessian[order[:, None], order]
    # inputs that were always zero: their weights are rounded, not dropped
    dead = ordered.diagonal() == 0
    for damping in DAMPING_LADDER:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        del damped
        inverse = torch.cholesky_inverse(lower)
        del lower
        importance = torch.empty(len(hessian))
        importance[order] = inverse.diagonal().reciprocal().float()
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and torch.isfinite(upper).all() and torch.isfinite(importance).all():
            return Factor(hessian.float(), order, upper.float(), importance, damping)
    return None


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes and scales of one weight matrix, and their loss."""

    codes: Tensor
    """Int8 (rows, columns)."""
    scales: Tensor
    """Float32 values that float16 represents exactly, (rows, columns / 32)."""
    method: Literal["gptq", "rtn"]
    """Method of the codes that were kept."""
    loss: float | None = None
    """Mean squared output error per token, tr(E H E^T); None without a Hessian."""
    rtn_loss: float | None = None
    """The same for rounding to nearest with scales fitted without inputs."""


def round_to_nearest(weight: Tensor) -> QuantizedLinear:
    """Quantize float32 weights (rows, columns) without calibration."""
    scales = fit_scales(weight, Q4_0)
    return QuantizedLinear(encode(weight, scales, Q4_0), scales, "rtn")


def quantize_weight(weight: Tensor, factor: Factor | None) -> QuantizedLinear:
    """Quantize (rows, columns) with GPTQ, or round to nearest if that has the smaller loss."""
    nearest = round_to_nearest(weight)
    if factor is None:
        return nearest
    rtn_loss = layer_loss(weight, decode(nearest.codes, nearest.scales), factor.hessian)
    scales = fit_scales(weight, Q4_0, factor.importance)
    codes = feed_back_errors(weight, scales, factor)
    loss = layer_loss(weight, decode(codes, scales), factor.hessian)
    if loss <= rtn_loss:
        return QuantizedLinear(codes, scales, "gptq", loss, rtn_loss)
    return QuantizedLinear(nearest.codes, nearest.scales, "rtn", rtn_loss, rtn_loss)


def feed_back_errors(weight: Tensor, scales: Tensor, factor: Factor) -> Tensor:
    """Choose int8 codes (rows, columns) for fixed scales, in blocks of 128 columns."""
    order, upper = factor.order, factor.upper
    work = weight.T[order].contiguous()  # (columns, rows): a column's weights lie together
    groups, codes = scales.T[order // BLOCK], torch.empty_like(work, dtype=torch.int8)
    for start in range(0, len(work), _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, len(work))
        errors = torch.empty_like(work[start:stop])
        for i in range(start, stop):
            chosen = (work[i] / groups[i]).round_().clamp_(Q4_0.lowest, Q4_0.highest)
            codes[i] = chosen
            error = (work[i] - chosen * groups[i]) / upper[i, i]
            errors[i - start] = error
            work[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous()


def layer_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Mean squared output error per token, tr((W - Q) H (W - Q)^T)."""
    error = weight - quantized
    return float(((error @ hessian) * error).sum(dtype=torch.float64))
