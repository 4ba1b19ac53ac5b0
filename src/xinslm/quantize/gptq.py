"""GPTQ (Frantar et al., arXiv:2210.17323) on llama.cpp's Q4_0 grid, or another one of blocks.

Columns are rounded one after another; each column's error is moved onto the remaining columns by
the inverse Hessian of the layer's squared output error. Scales are fixed beforehand from the
original weights ("static groups"), so columns can be rounded in order of importance ("act-order").
Codes and scales are then improved in turn (`descent.py`). If rounding to nearest has the smaller
layer loss, its result is kept instead.

    hessian = Hessian(columns); hessian.add(inputs)
    results = quantize_weights([query, key, value], factorise(hessian.mean()))

GPTAQ (Li et al., arXiv:2504.02692) aims at the outputs of the original model instead of those of
the original weights on the quantized model's inputs, which have drifted: with the drift of the
inputs known, `quantize_weights` moves the weights to the least-squares solution for them first.
A linear whose outputs are added to the residual stream is also aimed at what the stream itself has
lost by then, as far as its inputs tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from xinslm.model.grids import BLOCK, Q4_0, Grid, decode, encode, fit_scales, largest_scales
from xinslm.quantize.descent import descend

DRIFT_SHARE = 0.5
"""Share of the measured drift that is corrected (alpha in GPTAQ's paper): it is estimated from few
tokens. On SmolLM2-135M with 64 rows and inputs alone, the KL divergence of two texts is .087 and
.148 nats with 0, .047 and .112 with a half, .052 and .129 with 1; with the residual stream .041 and
.098 with a half of both, .042 and .107 with three quarters.
"""
DRIFT_TOKENS = 8
"""Calibration tokens for each column that the drift of a layer's inputs needs: with fewer, moving
the weights by it fits the noise, and GPTQ alone is used.
"""
DAMPING_LADDER = (0.01, 0.02, 0.05, 0.1)
_CHUNK_ROWS = 2048
_STRIPS = 6  # 7/12 of a full product
_FEW_COLUMNS = 32
_SMALL_TRIANGLE = 128


def suffice_for_drift(tokens: int, columns: int) -> bool:
    """Whether so many calibration tokens tell the drift of so many inputs well enough."""
    return tokens >= DRIFT_TOKENS * columns


@dataclass(frozen=True)
class Drift:
    """What the original model has over the quantized one, times the quantized one's inputs X, as a
    mean over tokens.
    """

    inputs: Tensor
    """Of the linear's inputs: drift^T X, float32 (columns, columns)."""
    stream: Tensor | None = None
    """Of the residual stream that the linear adds its outputs to, (hidden, columns)."""


class Hessian:
    """Sum of X^T X over a layer's inputs: chunks are computed in float32 and summed in float64.

    `mean` and `drift` give the sums away, so that they can be freed: 0.3 GB each for 6,144 columns.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.tokens = columns, 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float64)
        self._drift_sum: Tensor | None = None
        self._stream_sum: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add inputs (tokens, columns), without padding."""
        for chunk in inputs.float().split(_CHUNK_ROWS):
            for strip in _strips(self.columns):
                self._sum[strip, strip.start :] += chunk[:, strip].T @ chunk[:, strip.start :]
        self.tokens += len(inputs)

    def add_drift(self, drift: Tensor, inputs: Tensor) -> None:
        """Add how far the original model's inputs are from `inputs`, both (tokens, columns)."""
        if self._drift_sum is None:
            self._drift_sum = torch.zeros(self.columns, self.columns, dtype=torch.float64)
        for rows, others in zip(drift.split(_CHUNK_ROWS), inputs.split(_CHUNK_ROWS), strict=True):
            rows, others = rows.float(), others.float()
            for strip in _strips(self.columns):
                self._drift_sum[strip] += rows[:, strip].T @ others

    def add_stream_drift(self, drift: Tensor, inputs: Tensor) -> None:
        """Add how far the original model's residual stream (tokens, hidden), to which the linear
        adds its outputs, is from the quantized one's.
        """
        if self._stream_sum is None:
            self._stream_sum = torch.zeros(drift.shape[1], self.columns, dtype=torch.float64)
        for rows, others in zip(drift.split(_CHUNK_ROWS), inputs.split(_CHUNK_ROWS), strict=True):
            self._stream_sum += rows.float().T @ others.float()

    @property
    def is_finite(self) -> bool:
        """Whether no input was NaN, infinite, or too large to square, and no drift either."""
        sums = (self._sum, self._drift_sum, self._stream_sum)
        return all(bool(torch.isfinite(total.sum())) for total in sums if total is not None)

    @property
    def knows_drift(self) -> bool:
        """Whether drift was added, of at least `DRIFT_TOKENS` tokens for each column."""
        return self._drift_sum is not None and suffice_for_drift(self.tokens, self.columns)

    def drift(self) -> Drift | None:
        """What was added of drift; None if it is not known well enough."""
        is_known, inputs, stream = self.knows_drift, self._drift_sum, self._stream_sum
        self._drift_sum = self._stream_sum = None
        if inputs is None or not is_known:
            return None
        if stream is not None:
            stream = stream.div_(self.tokens).float()
        return Drift(inputs.div_(self.tokens).float(), stream)

    def mean(self) -> Tensor:
        """Mean over tokens, float64 (columns, columns)."""
        total, self._sum = self._sum, torch.empty(0, 0)
        for strip in _strips(self.columns):
            total[strip.stop :, strip] = total[strip, strip.stop :].T
        return total.div_(max(self.tokens, 1))


@dataclass(frozen=True)
class Factor:
    """Factorization shared by all weights that read the same inputs."""

    hessian: Tensor
    """Mean of X^T X, float32 (columns, columns)."""
    order: Tensor
    """Columns in rounding order, int64."""
    upper: Tensor
    """Upper Cholesky factor of the damped inverse Hessian, float32, in `order`; each row over its
    diagonal element, so that it moves a column's error onto the later columns."""
    importance: Tensor
    """1 / diag(H^-1), float32 (columns,): cost of an error that later columns compensate."""
    damping: float
    """Fraction of the mean diagonal that was added to make the Hessian invertible."""
    shift: Tensor | None = None
    """`DRIFT_SHARE` of the inputs' drift^T X H^-1, float32 (columns, columns)."""
    owed: Tensor | None = None
    """The same of the residual stream's drift, float32 (hidden, columns)."""

    def damped(self) -> Tensor:
        """The Hessian with the damping that made it invertible, float32 (columns, columns)."""
        damped = self.hessian.clone()
        diagonal = damped.diagonal()
        diagonal += self.damping * diagonal.mean()
        return damped

    def aim(self, weight: Tensor) -> Tensor:
        """The weights whose outputs are to be reproduced: W + W shift + owed for weights W (rows,
        columns), and W itself if no drift is known.
        """
        if self.shift is not None:
            weight = weight + weight @ self.shift
        return weight if self.owed is None else weight + self.owed


def rounding_order(diagonal: Tensor) -> Tensor:
    """Order columns (int64) by falling diagonal of the Hessian, ties by position ("act-order")."""
    return diagonal.argsort(descending=True, stable=True)


def factorise(hessian: Tensor, drift: Drift | None = None) -> Factor | None:
    """Invert and factorize a float64 Hessian (columns, columns); None if no damping suffices.

    `drift` is what `Hessian.drift` returns. Matrices are deleted as soon as they were
    used: four of float64 at once take 1.2 GB for 6,144 columns.
    """
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean())
    if not torch.isfinite(hessian.sum()) or mean <= 0:
        return None
    order, narrow = rounding_order(diagonal), hessian.float()
    # with H backwards = L L^T, the wanted factor of H^-1 is the inverse of L backwards
    backwards = order.flip(0)
    damped = hessian[backwards]
    del hessian
    damped = damped.gather(1, backwards.expand_as(damped))
    # inputs that were always zero: their weights are rounded, not dropped
    diagonal = diagonal[backwards]
    dead = diagonal == 0
    for damping in DAMPING_LADDER:
        damped.diagonal().copy_((diagonal + damping * mean).masked_fill_(dead, mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        lower = lower.float()  # its condition is only the root of H's
        inverse = invert_triangle(lower)
        del lower
        importance = torch.empty(len(narrow))
        importance[backwards] = inverse.square().sum(0).reciprocal()
        upper = (inverse / inverse.diagonal()[:, None]).flip(0, 1)
        if torch.isfinite(upper.sum()) and torch.isfinite(importance.sum()):
            del damped
            drifts = (None, None) if drift is None else (drift.inputs, drift.stream)
            shift, owed = (x if x is None else _regressed(x, inverse, backwards) for x in drifts)
            return Factor(narrow, order, upper, importance, damping, shift, owed)
    return None


def _regressed(drift: Tensor, inverse: Tensor, backwards: Tensor) -> Tensor:
    """Return `DRIFT_SHARE` of drift H^-1, from the inverse of H's Cholesky factor in that order."""
    product = drift[:, backwards].float() @ inverse.T
    product = (product @ inverse).mul_(DRIFT_SHARE)
    regressed = torch.empty_like(product)
    regressed[:, backwards] = product
    return regressed


def invert_triangle(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by halves, in a third of a general solver's products."""
    size = len(lower)
    if size <= _SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=lower.dtype)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    top, bottom = invert_triangle(lower[:half, :half]), invert_triangle(lower[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = top, bottom
    inverse[half:, :half] = bottom @ (lower[half:, :half] @ top).neg_()
    return inverse


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes and scales of one weight matrix, and their loss."""

    codes: Tensor
    """Int8 (rows, columns)."""
    scales: Tensor
    """Float32 values that float16 represents exactly, (rows, columns / 32)."""
    method: Literal["gptq", "rtn", "absmax"]
    """Method of the codes that were kept."""
    loss: float | None = None
    """Mean squared output error per token, tr(E H E^T), with E the distance to the weights that
    were aimed at: GPTAQ's are the moved ones. None without a Hessian."""
    rtn_loss: float | None = None
    """The same for rounding to nearest with scales fitted without inputs."""


def round_to_nearest(weight: Tensor, grid: Grid = Q4_0) -> QuantizedLinear:
    """Quantize float32 weights (rows, columns) without calibration."""
    scales = fit_scales(weight, grid)
    return QuantizedLinear(encode(weight, scales, grid), scales, "rtn")


def place_largest(weight: Tensor) -> QuantizedLinear:
    """Quantize float32 weights (rows, columns) to Q4_0 with each block's largest at code -8."""
    scales = largest_scales(weight)
    return QuantizedLinear(encode(weight, scales, Q4_0), scales, "absmax")


def quantize_weights(weights: Sequence[Tensor], factor: Factor | None) -> list[QuantizedLinear]:
    """Quantize matrices (rows, columns) that read the same inputs with GPTQ, or round to nearest
    where that has the smaller loss.
    """
    if factor is None or not weights:
        return [round_to_nearest(weight) for weight in weights]
    stacked, importance = torch.cat(list(weights)), factor.importance
    even = torch.ones_like(importance)
    wanted = factor.aim(stacked)
    if wanted is stacked:
        nearest, scales = fit_scales(stacked, Q4_0, torch.stack((even, importance)))
    else:
        nearest = fit_scales(stacked, Q4_0, even)
        scales = fit_scales(wanted, Q4_0, importance)
    codes = feed_back_errors(wanted, scales, factor)
    codes, scales = descend(wanted, codes, scales, factor.damped())
    results, start = [], 0
    for weight in weights:
        rows = slice(start, start := start + len(weight))
        gptq = codes[rows], scales[rows]
        rtn = encode(weight, nearest[rows], Q4_0), nearest[rows]
        loss, rtn_loss = (
            layer_loss(wanted[rows], decode(*kept), factor.hessian) for kept in (gptq, rtn)
        )
        if loss <= rtn_loss:
            results.append(QuantizedLinear(*gptq, "gptq", loss, rtn_loss))
        else:
            results.append(QuantizedLinear(*rtn, "rtn", rtn_loss, rtn_loss))
    return results


def feed_back_errors(
    weight: Tensor,
    scales: Tensor,
    factor: Factor,
    grid: Grid = Q4_0,
    offsets: Tensor | None = None,
) -> Tensor:
    """Choose int8 codes (rows, columns) for fixed scales, float32 (rows, columns / 32), none 0.

    `offsets`, of the same shape, are subtracted from the products of codes and scales.
    """
    order = factor.order
    work = weight.T[order].contiguous()  # (columns, rows): a column's weights lie together
    places, codes = order // BLOCK, torch.empty_like(work, dtype=torch.int8)
    groups = [x.T[places] for x in (scales, offsets) if x is not None]
    _round_columns(work, groups, factor.upper, codes, grid)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous()


def _round_columns(
    work: Tensor, groups: list[Tensor], upper: Tensor, codes: Tensor, grid: Grid
) -> None:
    """Fill `codes` for columns of weights `work` (columns, rows), which becomes their errors;
    `groups` are the scales of all weights, and the offsets if there are any.

    By halves: the errors of the first half reach the second in one matrix product.
    """
    if len(work) > _FEW_COLUMNS:
        half = len(work) // 2
        first, second = [part[:half] for part in groups], [part[half:] for part in groups]
        _round_columns(work[:half], first, upper[:half, :half], codes[:half], grid)
        work[half:].addmm_(upper[:half, half:].T, work[:half], alpha=-1)
        _round_columns(work[half:], second, upper[half:, half:], codes[half:], grid)
        return
    arrays = [part.numpy() for part in groups]
    _round_few(work.numpy(), arrays, upper.numpy(), codes.numpy(), grid)


def _round_few(
    work: np.ndarray, groups: list[np.ndarray], upper: np.ndarray, codes: np.ndarray, grid: Grid
) -> None:
    """`_round_columns` one by one, in numpy: for a single column calls of torch take longer."""
    chosen = np.empty_like(work)
    scales, *offsets = groups
    for i, (column, scale, code) in enumerate(zip(work, scales, chosen, strict=True)):
        column -= upper[:i, i] @ work[:i]
        for offset in offsets:
            column += offset[i]
        np.rint(column / scale, out=code)
        np.clip(code, grid.lowest, grid.highest, out=code)
        column -= code * scale
    codes[:] = chosen


def layer_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Mean squared output error per token, tr((W - Q) H (W - Q)^T)."""
    error, total = weight - quantized, 0.0
    for strip in _strips(len(hessian)):
        product = error[:, strip.stop :] @ hessian[strip.stop :, strip]  # and its transpose
        product.mul_(2).addmm_(error[:, strip], hessian[strip, strip])
        total += float(product.mul_(error[:, strip]).sum(dtype=torch.float64))
    return total


def _strips(columns: int) -> list[slice]:
    """Split columns into ranges: a symmetric product needs none with an earlier range."""
    starts = range(0, columns, -(-columns // _STRIPS))
    return [slice(start, min(start + starts.step, columns)) for start in starts]
