"""Intervals against scipy, and against the probabilities of all outcomes."""

import math

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.intervals import (
    Interval,
    hypergeometric_interval,
    t_interval,
    wilson_interval,
)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(
    ("right", "n"), [(0, 1), (1, 1), (0, 50), (1, 50), (25, 50), (9741, 10042)]
)
def test_wilson_is_scipys(right, n, confidence):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    found = wilson_interval(right, n, confidence=confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_is_the_set_of_proportions_that_a_score_test_does_not_reject():
    """At each end |p_hat - p| = z sqrt(p (1 - p) / n (N - n) / (N - 1))."""
    right, n, population = 37, 120, 500
    for size in (None, population):
        factor = 1 if size is None else (size - n) / (size - 1)
        interval = wilson_interval(right, n, size)
        for p in (interval.low, interval.high):
            error = math.sqrt(p * (1 - p) / n * factor)
            assert abs(right / n - p) / error == pytest.approx(1.959964, abs=1e-6)


def test_intervals_for_the_full_set_have_no_width_when_all_is_scored():
    scores = [1, 0, 1, 1, 0.0]
    for interval in (
        wilson_interval(3, 5, 5),
        t_interval(scores, 5),
        hypergeometric_interval(3, 5, 5),
        t_interval([0.4], 1),
    ):
        assert interval.width == 0
    assert wilson_interval(3, 5, 5) == Interval(0.6, 0.6)
    assert wilson_interval(3, 5).width > 0.5 and t_interval(scores).width > 0.5


def test_t_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(0).beta(2, 1, 37)
    for population, factor in [(None, 1.0), (60, 23 / 60)]:
        error = stats.sem(scores) * math.sqrt(factor)
        expected = stats.t.interval(0.95, 36, scores.mean(), error)
        found = t_interval(scores, population)
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "population"), [(1, 1), (1, 7), (5, 12), (11, 12), (20, 60), (50, 60)]
)
def test_hypergeometric_interval_covers_each_full_set_often_enough(n, population):
    """Coverage over all outcomes, with exact binomial coefficients; and no K is held in vain."""
    ends = [hypergeometric_interval(right, n, population) for right in range(n + 1)]
    ways = math.comb(population, n)
    for total in range(population + 1):
        chances = [
            math.comb(total, right) * math.comb(population - total, n - right) / ways
            for right in range(n + 1)
        ]
        held = [end.contains(total / population) for end in ends]
        assert sum(c for c, holds in zip(chances, held, strict=True) if holds) >= 0.95
        for right in range(n + 1):
            tails = sum(chances[: right + 1]), sum(chances[right:])
            assert held[right] == (min(tails) > 0.025 + 1e-12) or min(tails) == pytest.approx(0.025)


def test_hypergeometric_interval_is_clopper_and_pearsons_for_a_large_population():
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(31, 50).proportion_ci(0.95, method="exact")
    found = hypergeometric_interval(31, 50, 200_000)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(0, 0), "at least one item"),
        (lambda: wilson_interval(3, 2), "3 right answers of 2 items"),
        (lambda: wilson_interval(-1, 2), "-1 right answers"),
        (lambda: wilson_interval(math.nan, 2), "nan right answers"),
        (lambda: wilson_interval(1, 5, 4), "5 items were scored, but the full set has 4"),
        (lambda: wilson_interval(1, 5, confidence=95), "confidence 95"),
        (lambda: hypergeometric_interval(1, 5, 4), "full set has 4"),
        (lambda: t_interval([]), "no item"),
        (lambda: t_interval([1.0]), "at least two items"),
        (lambda: t_interval([0, math.nan]), "item 1 is nan"),
        (lambda: t_interval([[0, 1]]), "not shape"),
    ],
)
def test_what_cannot_be_computed_is_said(call, message):
    with pytest.raises(XinslmError, match=message):
        call()
