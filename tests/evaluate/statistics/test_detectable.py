"""Detectable differences: a simulated study finds them in about 80 % of its repetitions."""

import math

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics import (
    detectable_from_error,
    detectable_paired,
    detectable_unpaired,
)
from xinslm.evaluate.statistics.distributions import sign_test


def test_by_hand():
    """(1.960 + 0.842) sqrt(2 * 0.5 * 0.5 / 1000) = 6.26 points; 2.80 standard errors."""
    assert detectable_unpaired(0.5, 1000) == pytest.approx(0.06264, abs=1e-5)
    assert detectable_from_error(0.01) == pytest.approx(0.02802, abs=1e-5)
    assert detectable_from_error(0.01, alpha=0.01, power=0.9) == pytest.approx(0.03857, abs=1e-5)


def test_paired_solves_connors_equation():
    """Connor's n for discordance 0.2 and difference d, put back in, is n."""
    for discordance, n in [(0.2, 1000), (0.05, 14_042), (0.5, 200)]:
        d = detectable_paired(discordance, n)
        root = 1.959964 * math.sqrt(discordance) + 0.841621 * math.sqrt(discordance - d**2)
        assert (root / d) ** 2 == pytest.approx(n, rel=1e-5)


@pytest.mark.parametrize(("accuracy", "n"), [(0.3, 400), (0.6, 1000), (0.9, 300)])
def test_unpaired_power(accuracy, n):
    rng = np.random.default_rng(0)
    d = detectable_unpaired(accuracy, n)
    one = rng.binomial(n, accuracy + d / 2, 20_000) / n
    other = rng.binomial(n, accuracy - d / 2, 20_000) / n
    pooled = (one + other) / 2
    found = np.abs(one - other) / np.sqrt(2 * pooled * (1 - pooled) / n) > 1.959964
    assert 0.77 < found.mean() < 0.85


@pytest.mark.parametrize(("discordance", "n"), [(0.2, 1000), (0.05, 4000), (0.4, 200)])
def test_paired_power(discordance, n):
    """Of McNemar's test; the exact one is a little weaker."""
    rng = np.random.default_rng(0)
    d = detectable_paired(discordance, n)
    chances = [(discordance + d) / 2, (discordance - d) / 2, 1 - discordance]
    b, c, _ = rng.multinomial(n, chances, 4000).T
    assert 0.78 < ((b - c) ** 2 > 3.8415 * (b + c)).mean() < 0.83
    exact = [sign_test(int(x), int(y)) < 0.05 for x, y in zip(b, c, strict=True)]
    assert 0.74 < np.mean(exact) < 0.82


def test_without_flips_a_difference_still_needs_some():
    """About 7.8 items that one model alone answers right: fewer than 6 are never significant."""
    assert detectable_paired(0, 1000) == pytest.approx(7.85 / 1000, rel=0.01)
    assert detectable_paired(0.002, 1000) == detectable_paired(0, 1000)
    assert sign_test(5, 0) > 0.05 > sign_test(6, 0)


def test_more_items_and_fewer_flips_show_smaller_differences():
    assert detectable_paired(0.1, 1000) < detectable_paired(0.2, 1000)
    assert detectable_paired(0.1, 2000) < detectable_paired(0.1, 1000)
    assert detectable_paired(0.1, 1000) < detectable_unpaired(0.5, 1000)


def test_few_items_show_nothing():
    assert detectable_paired(1, 1) == 1
    assert detectable_unpaired(0.5, 1) == 1
    assert 0 < detectable_unpaired(1.0, 100) < 0.1
    assert 0 < detectable_unpaired(0.0, 100) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detectable_unpaired(0.5, 0), "at least one item"),
        (lambda: detectable_paired(0.5, 0), "at least one item"),
        (lambda: detectable_unpaired(math.nan, 10), "accuracy nan"),
        (lambda: detectable_paired(1.5, 10), r"discordance 1\.5"),
        (lambda: detectable_from_error(math.nan), "standard error nan"),
        (lambda: detectable_from_error(0.1, alpha=5), "alpha 5"),
        (lambda: detectable_from_error(0.1, power=80), "power 80"),
    ],
)
def test_what_makes_no_sense_is_said(call, message):
    with pytest.raises(XinslmError, match=message):
        call()
