"""Mean and standard error against lm-evaluation-harness; coverage for other items."""

import json
import math

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics import (
    Interval,
    full_set_estimate,
    generalisation_interval,
    group_mean_score,
    mean_score,
    t_interval,
)


def test_standard_error_is_that_of_the_harness():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    rng = np.random.default_rng(0)
    for scores in (rng.random(2), rng.integers(2, size=817), np.zeros(5), rng.beta(2, 1, 100)):
        found = mean_score(scores)
        assert found.mean == pytest.approx(metrics.mean(list(scores)), rel=1e-13)
        expected = metrics.mean_stderr(list(scores))
        assert found.standard_error == pytest.approx(expected, rel=1e-12)


def test_pooled_error_is_that_of_the_harness():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    rng = np.random.default_rng(1)
    sizes = [100, 2, 311, 57]
    parts = [
        rng.random(size) < share for size, share in zip(sizes, [0.2, 0.5, 0.9, 0.4], strict=True)
    ]
    errors = [metrics.mean_stderr([float(right) for right in part]) for part in parts]
    tasks = np.repeat(["law", "art", "physics", "logic"], sizes)
    shuffled = rng.permutation(len(tasks))
    found = group_mean_score(np.concatenate(parts)[shuffled], tasks[shuffled])
    assert found.standard_error == pytest.approx(metrics.pooled_sample_stderr(errors, sizes))
    assert found.mean == pytest.approx(np.concatenate(parts).mean())


def test_mean_of_the_staged_log_likelihoods(shared_data):
    """The accuracy that the harness reported follows from its log-likelihoods and targets."""
    path = shared_data / "bench" / "golden_lmeval_0.4.13_stories260K.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is absent")
    task = json.loads(path.read_text())["tasks"]["hellaswag_local"]
    right = [int(np.argmax(doc["ll"])) == int(doc["target"]) for doc in task["docs"]]
    found = mean_score(right)
    assert found.mean == pytest.approx(task["metrics"]["acc,none"], abs=1e-15)
    p = found.mean
    assert found.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 199))


def test_a_fully_scored_set_is_certain_and_still_tells_little_about_other_items():
    scores = [1, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert full_set_estimate(scores, population=10).interval == Interval(0.6, 0.6)
    assert mean_score(scores).standard_error == pytest.approx(math.sqrt(0.24 / 9))
    assert generalisation_interval(scores).width > 0.4


def test_degenerate_means():
    assert mean_score([0.25]).standard_error is None
    assert mean_score([1, 1, 1]).standard_error == 0
    assert group_mean_score([1, 0], ["a", "b"]).standard_error is None
    assert generalisation_interval([0.25]) == Interval(0, 1)
    all_right = generalisation_interval([1, 1, 1])
    assert all_right.high == 1 and 0.4 < all_right.low < 0.5  # 3 / (3 + z^2)
    assert generalisation_interval([0.99, 0.5, 1]).high == 1
    part = [0.2, 0.4, 0.7]
    assert generalisation_interval(part) == t_interval(part).clipped(0, 1)


@pytest.mark.parametrize("function", [mean_score, generalisation_interval])
@pytest.mark.parametrize(
    ("scores", "message"),
    [([], "no item"), ([0, math.nan], "item 1 is nan"), ([math.inf], "item 0 is inf")],
)
def test_no_mean_of_nothing_and_of_nan(function, scores, message):
    with pytest.raises(ValueError, match=message):
        function(scores)


def test_scores_outside_the_range_are_refused():
    with pytest.raises(XinslmError, match=r"item 1 is 1\.5"):
        generalisation_interval([0, 1.5])
    with pytest.raises(XinslmError, match="2 scores have 1 tasks"):
        group_mean_score([0, 1], ["a"])


@pytest.mark.parametrize(("accuracy", "n"), [(0.25, 50), (0.5, 200), (0.97, 1000)])
def test_coverage_for_other_items_is_about_the_nominal_one(accuracy, n):
    """Over all outcomes of Binomial(n, p); Wilson's coverage swings around 95 %."""
    stats = pytest.importorskip("scipy.stats")
    held = [
        generalisation_interval([1] * right + [0] * (n - right)).contains(accuracy)
        for right in range(n + 1)
    ]
    coverage = stats.binom.pmf(np.arange(n + 1), n, accuracy)[held].sum()
    assert 0.93 < coverage < 0.97
