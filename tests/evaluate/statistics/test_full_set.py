"""The interval of the full set's mean: how often it holds the full set's mean."""

import functools
import math
from collections import Counter

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics import (
    Interval,
    full_set_estimate,
    hypergeometric_interval,
    stratified_order,
)
from xinslm.evaluate.statistics.stratified import StratumSums, estimate_from_sums

ORDERS, ASSIGNMENTS = 500, 4
"""2,000 resamplings: random orders, and random places of the scores inside their strata."""
ENOUGH = 0.94
"""95 % less two standard errors of this many resamplings."""
MMLU = np.round(100 + 1434 * np.linspace(0, 1, 57) ** 5.2).astype(int)  # 57 unequal sizes
SETS = {
    "mmlu": (MMLU, [50, 200, 1000]),
    "hellaswag": (np.array([3243, 6799]), [50, 200, 1000]),
    "small": (np.array([31, 20, 6, 3]), [10, 30, 50]),
    "equal": (np.full(6, 10), [10, 30, 50]),
    "plain": (np.array([60]), [1, 10, 50, 59]),
}


@functools.cache
def prefixes(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Strata of all items; of each order the first items, shape (orders, n)."""
    sizes, lengths = SETS[name]
    strata = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    labels = strata.tolist()
    orders = [stratified_order(labels, seed)[: max(lengths)] for seed in range(ORDERS)]
    return strata, np.array(orders)


def sums(scores, strata, orders, sizes) -> StratumSums:
    """The core's input for many samples."""
    flat = strata[orders] + len(sizes) * np.arange(len(orders))[:, None]

    def by_stratum(values):
        total = np.bincount(flat.ravel(), values.ravel(), len(orders) * len(sizes))
        return total.reshape(len(orders), len(sizes))

    picked = scores[orders]
    ones = np.ones(orders.shape)
    return StratumSums(by_stratum(ones), by_stratum(picked), by_stratum(picked**2), sizes * 1.0)


def moved_in_strata(scores, strata, rng) -> np.ndarray:
    """The same scores in each stratum, at other items; the full set's mean stays."""
    by_stratum = np.argsort(strata, kind="stable")
    moved = np.empty_like(scores)
    moved[by_stratum] = scores[np.lexsort((rng.random(len(scores)), strata))]
    return moved


def coverage(scores, name: str, n: int) -> tuple[float, float, float]:
    """Share of the intervals that hold the mean; mean width; mean error in standard errors."""
    strata, orders = prefixes(name)
    rng = np.random.default_rng(n)
    found = []
    for _ in range(ASSIGNMENTS):
        moved = moved_in_strata(scores, strata, rng)
        found.append(estimate_from_sums(sums(moved, strata, orders[:, :n], SETS[name][0])))
    mean, low, high, _ = (np.concatenate(parts) for parts in zip(*found, strict=True))
    full = scores.mean()
    holds = (low - 1e-12 <= full) & (full <= high + 1e-12)
    bias = abs(mean.mean() - full) / max(mean.std() / math.sqrt(len(mean)), 1e-12)
    return holds.mean(), (high - low).mean(), bias


def binary_scores(name: str, accuracy: float, spread: float, seed: int) -> np.ndarray:
    """Right and wrong answers with another accuracy in each stratum."""
    strata, _ = prefixes(name)
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, spread, len(SETS[name][0]))
    return (rng.random(len(strata)) < np.clip(accuracy + shift, 0, 1)[strata]).astype(float)


@pytest.mark.parametrize("accuracy", [0.25, 0.5, 0.97])
@pytest.mark.parametrize("name", SETS)
def test_the_interval_holds_the_full_sets_accuracy(name, accuracy):
    scores = binary_scores(name, accuracy, 0.02 if accuracy > 0.9 else 0.15, seed=1)
    for n in SETS[name][1]:
        held, width, bias = coverage(scores, name, n)
        assert held >= ENOUGH, (n, held)
        assert bias < 4, (n, bias)
        if len(scores) > 1000:  # not wide without need: at most 10 % beyond the normal interval
            p = scores.mean()
            part = 1 - n / len(scores)
            normal = 3.92 * math.sqrt(p * (1 - p) / n * part)
            assert width < 1.1 * normal + 2.5 / n, (n, width, normal)


@pytest.mark.parametrize("name", ["mmlu", "hellaswag", "small"])
@pytest.mark.parametrize("kind", ["beta", "levels", "skewed"])
def test_the_interval_holds_the_full_sets_mean_of_other_scores(name, kind):
    strata, _ = prefixes(name)
    rng = np.random.default_rng(2)
    scores = {
        "beta": lambda: rng.beta(1.5, 2, len(strata)),
        "levels": lambda: rng.integers(0, 4, len(strata)) / 3,
        "skewed": lambda: np.where(rng.random(len(strata)) < 0.04, rng.random(len(strata)), 1.0),
    }[kind]()
    for n in SETS[name][1]:
        held, _, bias = coverage(scores, name, n)
        assert held >= ENOUGH, (n, held)
        assert bias < 4, (n, bias)


def test_strata_that_explain_the_scores_narrow_the_interval():
    """Accuracies of 0.05 and 0.95 by subject: far narrower than without strata, and it holds."""
    strata, orders = prefixes("mmlu")
    rng = np.random.default_rng(5)
    scores = (rng.random(len(strata)) < np.where(strata % 2, 0.95, 0.05)).astype(float)
    held, width, _ = coverage(scores, "mmlu", 1000)
    mixed = sums(scores, np.zeros_like(strata), orders, np.array([len(strata)]))
    _, low, high, _ = estimate_from_sums(mixed)
    assert held >= ENOUGH
    assert width < 0.65 * (high - low).mean()


def test_two_points_after_2400_items():
    """With a ten-minute budget: within 2 points of the value, for HellaSwag at its worst."""
    scores = np.arange(2400) % 2
    width = full_set_estimate(scores, population=10_042).interval.width
    assert width < 0.04


def test_one_sample_equals_the_core():
    strata, orders = prefixes("small")
    scores = binary_scores("small", 0.5, 0.1, seed=3)
    chosen = orders[7, :30]
    sizes = dict(enumerate(SETS["small"][0].tolist()))
    found = full_set_estimate(scores[chosen], strata[chosen].tolist(), sizes)
    mean, low, high, effect = estimate_from_sums(
        sums(scores, strata, orders[:20, :30], SETS["small"][0])
    )
    assert found.mean == mean[7] and found.interval == Interval(low[7], high[7])
    assert found.design_effect == effect[7]
    assert (found.num_items, found.population) == (30, 60)


def test_the_mean_weighs_strata_by_their_size():
    """12 of 100 and 12 of 300 items: 0.25 of 0.75 and 0.75 of 0.25, by hand 0.375."""
    scores = [1] * 9 + [0] * 3 + [1] * 3 + [0] * 9
    found = full_set_estimate(scores, ["a"] * 12 + ["b"] * 12, {"a": 100, "b": 300})
    assert found.mean == pytest.approx(0.375)
    # s^2 = 12/11 * 3/16 in both; v = (1/16 * 0.88 + 9/16 * 0.96) * s^2 / 12
    variance = (0.88 / 16 + 0.96 * 9 / 16) * (12 / 11 * 3 / 16) / 12
    plain = (1 - 24 / 400) * 0.375 * 0.625 / 23
    weight = 4 * 24 * 0.375 * 0.625
    expected = (weight * variance / plain + 10) / (weight + 10)
    assert found.design_effect == pytest.approx(expected)


def test_without_strata_it_is_the_exact_interval():
    for right in range(21):
        scores = [1] * right + [0] * (20 - right)
        found = full_set_estimate(scores, population=300)
        exact = hypergeometric_interval(right, 20, 300)
        assert found.mean == pytest.approx(right / 20)
        assert found.interval.low == pytest.approx(exact.low, abs=1 / 300 + 1e-9)
        assert found.interval.high == pytest.approx(exact.high, abs=1 / 300 + 1e-9)
        assert found.interval.low <= exact.low + 1e-9 and found.interval.high >= exact.high - 1e-9


def test_strata_with_few_items_are_pooled():
    """57 subjects, 20 of them scored with one item each: still the plain mean's precision."""
    labels = [f"s{i}" for i in range(57)]
    scores = [i % 2 for i in range(20)]
    found = full_set_estimate(scores, labels[:40:2], dict.fromkeys(labels, 100))
    plain = full_set_estimate(scores, population=5700)
    assert 0.3 < found.mean < 0.7
    assert found.interval.width == pytest.approx(plain.interval.width, rel=0.15)


def test_degenerate_samples():
    one = full_set_estimate([1], population=10_000)
    assert one.mean == 1 and one.interval.high == 1 and one.interval.low < 0.03
    equal = full_set_estimate([0.5] * 40, population=400)
    assert equal.mean == 0.5 and 0.05 < equal.interval.width < 0.2
    wrong = full_set_estimate([0] * 50, population=1000)
    assert wrong.interval.low == 0 and 0.05 < wrong.interval.high < 0.08
    labels = ["a", "b", "b", "c"]
    full = full_set_estimate([0.1, 0.2, 0.6, 1.0], labels, Counter(labels))
    assert full.interval.low == pytest.approx(0.475) and full.interval.width < 1e-12
    last = full_set_estimate([1] * 30 + [0] * 29, population=60)
    assert (last.interval.low, last.interval.high) == pytest.approx((30 / 60, 31 / 60))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], None, None, 5), "no item"),
        (([math.nan], None, None, 5), "item 0 is nan"),
        (([2], None, None, 5), "item 0 is 2.0"),
        (([1, 0], None, None, 1), "a full set|full set has 1"),
        (([1], None, None, None), "or population alone"),
        (([1], ["a"], None, 5), "or population alone"),
        (([1], ["a"], {"a": 3}, 5), "or population alone"),
        (([1], ["b"], {"a": 3}, None), "stratum 'b'"),
        (([1, 1], ["a"], {"a": 3}, None), "2 scores have 1 strata"),
        (([1, 1], ["a", "a"], {"a": 1, "b": 8}, None), "'a': 2 items were scored"),
        (([1], None, None, 5, 1.0), "confidence 1.0"),
    ],
)
def test_what_cannot_be_estimated_is_said(arguments, message):
    with pytest.raises(XinslmError, match=message):
        full_set_estimate(*arguments)
