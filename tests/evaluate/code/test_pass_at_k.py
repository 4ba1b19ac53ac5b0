"""pass@k against all choices of k samples, and its standard error against the standard library."""

import itertools
import statistics

import pytest

from xinslm.evaluate.code.pass_at_k import mean_pass_at_k, pass_at_k


def test_golden():
    # 1 - C(3, 3) / C(5, 3); the biased 1 - (1 - c/n)^k would be 0.784
    assert pass_at_k(5, 2, 3) == 0.9


@pytest.mark.parametrize("n", range(1, 8))
def test_is_the_share_of_choices_with_a_correct_sample(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            choices = list(itertools.combinations(samples, k))
            share = sum(map(any, choices)) / len(choices)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-15)


def test_many_samples_do_not_overflow():
    assert pass_at_k(100_000, 1, 100) == pytest.approx(0.001)


@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 3), (2, 1, 0), (0, 0, 1), (2, 3, 1), (2, -1, 1)])
def test_impossible_numbers_raise(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_mean_and_standard_error():
    counts = [(5, 2), (5, 0), (7, 7), (10, 1)]
    values = [pass_at_k(n, c, 3) for n, c in counts]
    result = mean_pass_at_k(counts, 3)
    assert result.value == pytest.approx(statistics.mean(values))
    assert result.standard_error == pytest.approx(statistics.stdev(values) / 2)
    assert mean_pass_at_k([(5, 2)], 3).standard_error is None
    with pytest.raises(ValueError, match="no problems"):
        mean_pass_at_k([], 1)
    with pytest.raises(ValueError, match="pass@6 needs at least 6"):
        mean_pass_at_k(counts, 6)
