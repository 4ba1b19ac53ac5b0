"""Confidence intervals for a proportion and for a mean.

`population` is the size of the full set. With it, an interval is about the full set's value, of
which `num_items` were scored at random without replacement: the variance is multiplied by the
finite-population correction (N - n) / (N - 1) (Cochran, Sampling Techniques, 1977, chapters 2 and
3), and at n = N the interval has no width. Without it, an interval is about the value of all
items of this kind, of which the scored ones are a sample; it keeps its width at n = N.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.checks import (
    finite_array,
    require_confidence,
    require_population,
)
from xinslm.evaluate.statistics.distributions import log_factorials, two_sided_normal, two_sided_t


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends belong to it."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """The distance of the ends."""
        return self.high - self.low

    def contains(self, value: float, tolerance: float = 1e-12) -> bool:
        """Whether a value is in the interval, up to rounding."""
        return self.low - tolerance <= value <= self.high + tolerance

    def clipped(self, low: float, high: float) -> "Interval":
        """The part of the interval between two limits."""
        return Interval(min(max(self.low, low), high), max(min(self.high, high), low))


def wilson_interval(
    successes: float, num_items: int, population: int | None = None, confidence: float = 0.95
) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927; Brown, Cai and DasGupta 2001).

    center (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n). With
    `population`, n is replaced by n (N - 1) / (N - n), the size of a sample with replacement that
    has the same variance. Its coverage is the nominal one on average; near 0 and 1 it can be
    below by a few points, where `hypergeometric_interval` never is.
    """
    _require_counts(successes, num_items, population, confidence)
    size = float(num_items)
    if population is not None:
        if population == num_items:
            return Interval(successes / num_items, successes / num_items)
        size *= (population - 1) / (population - num_items)
    share, square = successes / num_items, two_sided_normal(confidence) ** 2
    shrink = 1 + square / size
    center = (share + square / (2 * size)) / shrink
    half = math.sqrt(square * (share * (1 - share) / size + square / (4 * size**2))) / shrink
    low = 0.0 if share == 0 else max(0.0, center - half)
    high = 1.0 if share == 1 else min(1.0, center + half)
    return Interval(low, high)


def t_interval(
    scores: ArrayLike, population: int | None = None, confidence: float = 0.95
) -> Interval:
    """Student's interval for a mean: mean +- t s / sqrt(n), s with n - 1; n - 1 degrees of freedom.

    With `population`, s^2 / n is multiplied by (N - n) / N. Needs two items, except at n = N.
    """
    values = finite_array(scores)
    require_confidence(confidence)
    n, mean = len(values), float(values.mean())
    correction = 1.0
    if population is not None:
        require_population(n, population)
        correction = (population - n) / population
    if not correction:
        return Interval(mean, mean)
    if n < 2:
        raise XinslmError("scores: the interval of a mean needs at least two items; there is one")
    half = two_sided_t(confidence, n - 1) * math.sqrt(correction * float(values.var(ddof=1)) / n)
    return Interval(mean - half, mean + half)


def hypergeometric_interval(
    successes: int, num_items: int, population: int, confidence: float = 0.95
) -> Interval:
    """Exact interval for the share of right answers in the full set.

    It holds each share K/N for which neither `successes` or fewer nor `successes` or more right
    answers have a probability of (1 - confidence) / 2 or less, X ~ Hypergeometric(N, K, n). Its
    coverage is at least the confidence for each K (Clopper and Pearson 1934; without replacement,
    Cochran 1977, chapter 3).
    """
    _require_counts(successes, num_items, population, confidence)
    tail = (1 - confidence) / 2
    high = _largest_total(successes, num_items, population, tail)
    low = population - _largest_total(num_items - successes, num_items, population, tail)
    return Interval(low / population, high / population)


def _require_counts(
    successes: float, num_items: int, population: int | None, confidence: float
) -> None:
    require_confidence(confidence)
    if num_items < 1:
        raise XinslmError("the interval of a proportion needs at least one item; there is none")
    if not 0 <= successes <= num_items:
        raise XinslmError(f"{successes} right answers of {num_items} items are not possible")
    if population is not None:
        require_population(num_items, population)


@lru_cache(maxsize=4096)
def _largest_total(successes: int, num_items: int, population: int, tail: float) -> int:
    """The largest K with P(X <= successes) > tail, by bisection: the probability falls with K."""
    low, high = successes, population - num_items + successes
    while low < high:
        middle = (low + high + 1) // 2
        if _lower_tail(successes, num_items, population, middle) > tail:
            low = middle
        else:
            high = middle - 1
    return low


def _lower_tail(successes: int, num_items: int, population: int, total: int) -> float:
    """P(X <= successes) for X ~ Hypergeometric(population, total, num_items)."""
    log = log_factorials(population)
    wrong = population - total
    k = np.arange(max(0, num_items - wrong), min(successes, total) + 1)
    terms = (
        (log[total] - log[k] - log[total - k])
        + (log[wrong] - log[num_items - k] - log[wrong - num_items + k])
        - (log[population] - log[num_items] - log[population - num_items])
    )
    return float(np.exp(terms).sum())
