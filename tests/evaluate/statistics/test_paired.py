"""Paired comparison against scipy, against all resamples of small sets, and by simulation."""

import itertools
import math

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics import Interval, compare_answers, compare_scores
from xinslm.evaluate.statistics.bootstrap import bootstrap_means, percentile_interval


def answers(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers with these counts, in mixed order."""
    pairs = [(1, 1)] * both + [(1, 0)] * first + [(0, 1)] * second + [(0, 0)] * neither
    one, other = np.random.default_rng(0).permutation(np.array(pairs)).T
    return one, other


def test_flips_accuracies_and_p_value():
    stats = pytest.importorskip("scipy.stats")
    found = compare_answers(*answers(40, 21, 9, 30), seed=0)
    assert (found.only_first_right, found.only_second_right) == (21, 9)
    assert found.difference == pytest.approx(0.61 - 0.49)
    assert found.discordance == pytest.approx(0.3)
    assert found.p_value == pytest.approx(stats.binomtest(9, 30).pvalue)


def test_standard_error_is_that_of_the_differences():
    one, other = answers(40, 21, 9, 30)
    found = compare_answers(one, other, seed=0)
    assert found.standard_error == pytest.approx((one - other).std(ddof=1) / 10)
    b, c, n = 21, 9, 100
    assert found.standard_error == pytest.approx(
        math.sqrt((b + c - (b - c) ** 2 / n) / n / (n - 1))
    )


def test_bootstrap_of_few_items_is_that_of_all_resamples():
    """All 5^5 resamples of five differences, enumerated; tails by Student's t with 4 degrees."""
    one, other = np.array([1, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 1])
    every = [np.mean(sample) for sample in itertools.product((one - other).tolist(), repeat=5)]
    tail = 0.5 * math.erfc(2.776445 * math.sqrt(5 / 4) / math.sqrt(2))
    expected = np.quantile(every, [tail, 1 - tail], method="inverted_cdf")
    found = compare_answers(one, other, seed=1, num_resamples=20_000).interval
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_both_ways_to_resample_have_the_same_distribution():
    """Counts of few rows, and indices of many: mean, covariance and tails agree with theory."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    many = rng.normal(size=(400, 2)) @ np.array([[1, 0.5], [0, 1]])
    few = np.sign(np.round(many))
    for rows in (few, many):
        means = bootstrap_means(rows, seed=2, num_resamples=4000)
        covariance = np.cov(rows.T, ddof=0) / len(rows)
        scale = np.sqrt(np.diag(covariance) / 4000)
        assert np.abs((means.mean(axis=0) - rows.mean(axis=0)) / scale).max() < 4
        assert np.cov(means.T) == pytest.approx(covariance, rel=0.15)
        normal = (means[:, 0] - rows[:, 0].mean()) / math.sqrt(covariance[0, 0])
        assert stats.kstest(normal, "norm").statistic < 0.05


def test_bootstrap_interval_covers_with_ten_items():
    """Normal scores: Student's interval is exact there. Plain percentiles hold 90 % only."""
    rng = np.random.default_rng(3)
    held = []
    for _ in range(1000):
        rows = rng.normal(size=(10, 1))
        means = bootstrap_means(rows, seed=0, num_resamples=1000)[:, 0]
        held.append(percentile_interval(means, 10).contains(0))
    assert np.mean(held) > 0.925


def test_infinite_values_stay_in_the_tail():
    values = np.array([*range(9900), *[math.inf] * 100])
    interval = percentile_interval(values, 10_000)
    assert interval.low == pytest.approx(249, abs=1) and interval.high == pytest.approx(9749, abs=1)


def test_same_seed_same_interval():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 300))
    one = compare_scores(first, second, seed=5, num_resamples=500)
    assert one == compare_scores(first, second, seed=5, num_resamples=500)
    assert one.interval != compare_scores(first, second, seed=6, num_resamples=500).interval


def test_t_test_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    first = rng.gamma(2, 1, 80)
    second = first + rng.normal(0.1, 0.4, 80)
    found = compare_scores(first, second, seed=0)
    expected = stats.ttest_rel(first, second)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.standard_error == pytest.approx(stats.sem(first - second), rel=1e-12)
    interval = expected.confidence_interval()
    assert found.interval.low == pytest.approx(interval.low, abs=0.25 * found.standard_error)
    assert found.interval.high == pytest.approx(interval.high, abs=0.25 * found.standard_error)


def test_weights_give_the_difference_of_the_totals():
    """Bits per byte of two models over the same bytes; the error is that of a jackknife."""
    rng = np.random.default_rng(4)
    num_bytes = rng.integers(5, 400, 150)
    bits = rng.gamma(5, 0.2, (2, 150)) * num_bytes
    found = compare_scores(*(bits / num_bytes), weights=num_bytes, seed=0)
    assert found.difference == pytest.approx((bits[0].sum() - bits[1].sum()) / num_bytes.sum())
    change, total = bits[0] - bits[1], num_bytes.sum()
    left_out = (change.sum() - change) / (total - num_bytes)
    jackknife = math.sqrt(149 / 150 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.standard_error == pytest.approx(jackknife, rel=0.03)
    assert found.interval.width == pytest.approx(3.92 * jackknife, rel=0.1)


@pytest.mark.parametrize("first", [0.15, 0.02])
def test_intervals_hold_the_true_difference(first):
    """1,000 sets of 400 items; with few flips the adjusted interval is the one that holds it."""
    rng = np.random.default_rng(0)
    chances = [first, 0.01, 0.5, 0.49 - first]
    held = {"interval": 0, "adjusted_interval": 0}
    for _ in range(1000):
        b, c, both, neither = rng.multinomial(400, chances)
        one = np.repeat([1, 0, 1, 0], [b, c, both, neither])
        other = np.repeat([0, 1, 1, 0], [b, c, both, neither])
        found = compare_answers(one, other, seed=0, num_resamples=400)
        for name in held:
            held[name] += getattr(found, name).contains(first - 0.01)
    assert held["adjusted_interval"] >= 935
    assert held["interval"] >= 915


def test_equal_models_are_rarely_called_different():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(500):
        b, c, same = rng.multinomial(300, [0.1, 0.1, 0.8])
        one, other = np.repeat([1, 0, 1], [b, c, same]), np.repeat([0, 1, 1], [b, c, same])
        found.append(compare_answers(one, other, seed=0, num_resamples=1).p_value < 0.05)
    assert np.mean(found) <= 0.065


def test_equal_answers():
    found = compare_answers([1, 0, 1], [1, 0, 1], seed=0)
    assert (found.difference, found.p_value, found.standard_error) == (0, 1, 0)
    assert found.interval == Interval(0, 0)
    assert found.adjusted_interval.low < -0.3 and found.adjusted_interval.high > 0.3


def test_one_item_and_equal_differences():
    one = compare_answers([1], [0], seed=0)
    assert (one.difference, one.p_value, one.standard_error) == (1, 1, None)
    assert one.interval is None and one.adjusted_interval.high <= 1
    single = compare_scores([0.5], [0.25], seed=0)
    assert (single.p_value, single.standard_error, single.interval) == (None, None, None)
    assert single.difference == 0.25
    assert compare_scores([1.5, 2.5], [1.5, 2.5], seed=0).p_value == 1
    assert compare_scores([1.5, 2.5], [1, 2], seed=0).p_value == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_answers([], [], seed=0), "first: there is no item"),
        (lambda: compare_answers([1, 0], [1], seed=0), "first has 2 items and second has 1"),
        (lambda: compare_answers([1, math.nan], [1, 0], seed=0), "first: item 1 is nan"),
        (lambda: compare_answers([1, 0], [1, 0.5], seed=0), "second: 0.5 is neither 1"),
        (lambda: compare_answers([1], [1], seed=0, num_resamples=0), "num_resamples 0"),
        (lambda: compare_scores([1], [math.inf], seed=0), "second: item 0 is inf"),
        (lambda: compare_scores([1], [1], [1, 2], seed=0), "weights has 2"),
        (lambda: compare_scores([1, 1], [1, 1], [0, 0], seed=0), "one must be above 0"),
        (lambda: compare_scores([1, 1], [1, 1], [-1, 2], seed=0), "none may be negative"),
    ],
)
def test_what_cannot_be_compared_is_said(call, message):
    with pytest.raises(XinslmError, match=message):
        call()
