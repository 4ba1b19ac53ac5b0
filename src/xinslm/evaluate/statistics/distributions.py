"""Quantiles and tails of the normal, Student's t and the binomial distribution, without scipy.

Student's t follows from the regularized incomplete beta function: for t with d degrees of freedom,
P(|T| > t) = I_x(d/2, 1/2) with x = d / (d + t^2) (Abramowitz and Stegun 1964, 26.7.1). The function
is computed with its continued fraction (26.5.8), evaluated by Lentz's method (Lentz 1976).
"""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from xinslm.evaluate.statistics.checks import Floats

_TINY = 1e-300
_MAX_TERMS = 100_000


def normal_quantile(probability: float) -> float:
    """The number that a standard normal variable is below with this probability."""
    return NormalDist().inv_cdf(probability)


def two_sided_normal(confidence: float) -> float:
    """The z with P(|Z| < z) = confidence; 1.96 for 0.95."""
    return normal_quantile((1 + confidence) / 2)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    return math.exp(log_front) / (a * _beta_fraction(a, b, x))


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), the denominator of 26.5.8."""
    value, c, d = 1.0, 1.0, 0.0
    for term in range(1, _MAX_TERMS):
        m = term // 2
        if term % 2:
            coefficient = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            coefficient = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + coefficient * d or _TINY)
        c = 1 + coefficient / c or _TINY
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def t_two_sided(t: float, degrees: float) -> float:
    """P(|T| > |t|), the p-value of a two-sided t-test."""
    if math.isinf(t):
        return 0.0
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


@lru_cache(maxsize=256)
def two_sided_t(confidence: float, degrees: float) -> float:
    """The t with P(|T| < t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while t_two_sided(high, degrees) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if t_two_sided(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` of `wins + losses` fair coin flips.

    2 P(X <= min(wins, losses)) with X ~ Binomial(wins + losses, 1/2), at most 1; in integers, so
    exact before the last division. Without any flip it is 1.
    """
    total = wins + losses
    term = tail = 1
    for k in range(min(wins, losses)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


@lru_cache(maxsize=4)
def log_factorials(largest: int) -> Floats:
    """log(0!), log(1!), ..., log(largest!)."""
    logs = np.zeros(largest + 1)
    np.cumsum(np.log(np.arange(1, largest + 1)), out=logs[1:])
    logs.setflags(write=False)
    return logs
