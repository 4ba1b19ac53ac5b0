"""Quantiles and tails against scipy, and against sums over all outcomes."""

import itertools
import math

import numpy as np
import pytest

from xinslm.evaluate.statistics.distributions import (
    incomplete_beta,
    log_factorials,
    sign_test,
    t_two_sided,
    two_sided_normal,
    two_sided_t,
)


def test_incomplete_beta_is_scipys():
    special = pytest.importorskip("scipy.special")
    for a, b in itertools.product([0.5, 1, 2.5, 40, 7020.5], repeat=2):
        for x in [0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1]:
            assert incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), abs=1e-11)


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 57.5, 1000, 14041])
def test_students_t_is_scipys(degrees):
    stats = pytest.importorskip("scipy.stats")
    for t in [0, 0.1, 1.3, -2, 4.5, 30]:
        assert t_two_sided(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), rel=1e-9)
    for confidence in [0.5, 0.9, 0.95, 0.999]:
        expected = stats.t.ppf((1 + confidence) / 2, degrees)
        assert two_sided_t(confidence, degrees) == pytest.approx(expected, rel=1e-9)


def test_t_table():
    """Student's table: 12.706 with 1, 2.228 with 10, 1.984 with 100 degrees of freedom."""
    found = [round(two_sided_t(0.95, degrees), 3) for degrees in (1, 10, 100)]
    assert found == [12.706, 2.228, 1.984]
    assert two_sided_normal(0.95) == pytest.approx(1.959963985, abs=1e-9)


@pytest.mark.parametrize("flips", range(1, 11))
def test_sign_test_counts_all_outcomes(flips):
    """Each of the 2^n outcomes that is at least as far from the middle has its share."""
    wins = [sum(outcome) for outcome in itertools.product([0, 1], repeat=flips)]
    for observed in range(flips + 1):
        far = abs(2 * observed - flips)
        expected = sum(abs(2 * w - flips) >= far for w in wins) / len(wins)
        assert sign_test(observed, flips - observed) == pytest.approx(expected, abs=1e-15)


def test_sign_test_is_scipys_for_many_flips():
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in [(0, 6), (300, 421), (7100, 6942), (14042, 0), (5, 5), (0, 0)]:
        total = wins + losses
        expected = stats.binomtest(wins, total).pvalue if total else 1
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-8)


def test_log_factorials():
    logs = log_factorials(20_000)
    assert logs[0] == 0
    for n in (1, 2, 10, 171, 20_000):
        assert logs[n] == pytest.approx(math.lgamma(n + 1), rel=1e-13, abs=1e-13)
    assert len(log_factorials(0)) == 1 and np.isfinite(logs).all()
