"""Two models on the same items: the difference of their scores, and whether it can be chance.

Both models find the same items hard, so the differences item by item vary less than the scores:
a paired comparison sees smaller differences than two standard errors of the means do (Miller,
arXiv:2411.00640).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.bootstrap import (
    NUM_RESAMPLES,
    bootstrap_means,
    percentile_interval,
)
from xinslm.evaluate.statistics.checks import (
    Floats,
    finite_array,
    require_same_items,
    right_wrong_array,
)
from xinslm.evaluate.statistics.distributions import sign_test, t_two_sided, two_sided_normal
from xinslm.evaluate.statistics.intervals import Interval


@dataclass(frozen=True)
class AnswerComparison:
    """Right and wrong answers of two models to the same items."""

    num_items: int
    difference: float
    """Accuracy of the first model minus that of the second."""
    only_first_right: int
    only_second_right: int
    p_value: float
    """Of McNemar's exact test."""
    standard_error: float | None
    """Of the difference; None with one item."""
    interval: Interval | None
    """Paired bootstrap, 95 % by default; None with one item. Without a flip it has no width; with
    few flips take `adjusted_interval`.
    """
    adjusted_interval: Interval
    """In closed form, with one flip added in each direction; has a width without any flip."""

    @property
    def discordance(self) -> float:
        """The share of items that exactly one of the models answers right."""
        return (self.only_first_right + self.only_second_right) / self.num_items


@dataclass(frozen=True)
class ScoreComparison:
    """Scores of two models for the same items, such as bits per byte."""

    num_items: int
    difference: float
    """Weighted mean of the first model's scores minus that of the second."""
    p_value: float | None
    """Two-sided paired t-test; None with one item."""
    standard_error: float | None
    """Of the difference; None with one item."""
    interval: Interval | None
    """Paired bootstrap, 95 % by default; None with one item."""


def compare_answers(
    first: ArrayLike,
    second: ArrayLike,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> AnswerComparison:
    """Compare two models by 1 (right) and 0 (wrong) for each item.

    With b items that only the first and c that only the second model answers right:

        difference (b - c) / n; standard error sqrt((b + c - (b - c)^2 / n) / (n (n - 1)))
        p-value: 2 P(X <= min(b, c)), X ~ Binomial(b + c, 1/2) (McNemar 1947, exact form)
        adjusted interval: the same with b + 1, c + 1 and n + 2, times the normal quantile, and
        n + 2 for n - 1 (Bonett and Price 2012)
    """
    one, other = right_wrong_array(first, "first"), right_wrong_array(second, "second")
    require_same_items([one, other], ["first", "second"])
    n = len(one)
    difference = one - other
    b, c = int((difference > 0).sum()), int((difference < 0).sum())
    means = bootstrap_means(difference[:, None], seed, num_resamples)[:, 0]
    return AnswerComparison(
        num_items=n,
        difference=(b - c) / n,
        only_first_right=b,
        only_second_right=c,
        p_value=sign_test(b, c),
        standard_error=_standard_error(difference, np.ones(n)),
        interval=percentile_interval(means, n, confidence) if n > 1 else None,
        adjusted_interval=_adjusted_interval(b, c, n, confidence),
    )


def compare_scores(
    first: ArrayLike,
    second: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> ScoreComparison:
    """Compare two models by any score of each item, optionally weighted.

    With per-item bits per byte and the bytes as weights, the difference is that of the total bits
    per byte. For d_i = first - second and weights w_i (1 by default):

        difference D = sum w_i d_i / sum w_i
        standard error sqrt(n / (n - 1) sum w_i^2 (d_i - D)^2) / sum w_i
        (linearized ratio, Cochran 1977, chapter 6; s / sqrt(n) if all weights are equal)
        p-value: t = D / standard error with n - 1 degrees of freedom
    """
    one, other = finite_array(first, "first"), finite_array(second, "second")
    weight = np.ones(len(one)) if weights is None else finite_array(weights, "weights")
    require_same_items([one, other, weight], ["first", "second", "weights"])
    if (weight < 0).any() or not weight.sum():
        raise XinslmError("weights: none may be negative, and one must be above 0")
    difference = one - other
    mean = float(weight @ difference / weight.sum())
    error = _standard_error(difference, weight)
    rows = np.stack([weight * difference, weight], axis=1)
    means = bootstrap_means(rows, seed, num_resamples)
    means = means[means[:, 1] > 0]  # a resample without any weight has no mean
    interval = None
    if error is not None:
        interval = percentile_interval(means[:, 0] / means[:, 1], len(one), confidence)
    return ScoreComparison(
        num_items=len(one),
        difference=mean,
        p_value=None if error is None else _t_test(mean, error, len(one)),
        standard_error=error,
        interval=interval,
    )


def _standard_error(difference: Floats, weight: Floats) -> float | None:
    n = len(difference)
    if n < 2:
        return None
    total = weight.sum()
    residuals = weight * (difference - weight @ difference / total)
    return math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(total)


def _t_test(mean: float, error: float, num_items: int) -> float:
    """1 if nothing differs; 0 if everything differs by the same."""
    if not mean:
        return 1.0
    return t_two_sided(mean / error if error else math.inf, num_items - 1)


def _adjusted_interval(b: int, c: int, n: int, confidence: float) -> Interval:
    one, other = (b + 1) / (n + 2), (c + 1) / (n + 2)
    center = one - other
    half = two_sided_normal(confidence) * math.sqrt((one + other - center**2) / (n + 2))
    return Interval(center - half, center + half).clipped(-1, 1)
