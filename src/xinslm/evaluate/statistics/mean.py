"""The mean of per-item scores with its standard error, as lm-evaluation-harness gives it.

The standard error and `generalisation_interval` answer the question of a leaderboard: how far would
the mean move with other items of the same kind? That is uncertain even if every item of the set was
scored. Where the value of the full set is, after a part of it was scored, is another question:
`full_set_estimate` answers it.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.checks import finite_array, is_binary, score_array
from xinslm.evaluate.statistics.intervals import Interval, t_interval, wilson_interval
from xinslm.evaluate.statistics.order import stratum_codes


@dataclass(frozen=True)
class MeanScore:
    """A mean of `num_items` scores."""

    mean: float
    standard_error: float | None
    """How far the mean would move with other items of the same kind; None with one item."""
    num_items: int


def mean_score(scores: ArrayLike) -> MeanScore:
    """Mean and s / sqrt(n), s the standard deviation with n - 1; `mean_stderr` of lm-eval 0.4."""
    values = finite_array(scores)
    n = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return MeanScore(float(values.mean()), error, n)


def group_mean_score(scores: ArrayLike, tasks: Sequence[Hashable]) -> MeanScore:
    """Mean over the items of several tasks, such as MMLU's subjects, with the pooled error.

    sqrt(sum_h (n_h - 1) s_h^2 / (n - H) / n) for H tasks, `pooled_sample_stderr` of lm-eval 0.4:
    what would change with other items of the same tasks. None if each task has one item; lm-eval
    fails if any task has one.
    """
    values = finite_array(scores)
    if len(tasks) != len(values):
        raise XinslmError(f"{len(values)} scores have {len(tasks)} tasks; each needs one")
    codes = stratum_codes(tasks)
    counts = np.bincount(codes)
    means = np.bincount(codes, values) / counts
    n, degrees = len(values), len(values) - len(counts)
    error = None
    if degrees:
        error = math.sqrt(float(((values - means[codes]) ** 2).sum()) / degrees / n)
    return MeanScore(float(values.mean()), error, n)


def generalisation_interval(scores: ArrayLike, confidence: float = 0.95) -> Interval:
    """In which interval the mean over all items of this kind is; scores are between 0 and 1.

    Wilson's interval for right and wrong answers, else Student's inside [0, 1]. The spread is
    unknown with one score that is neither 0 nor 1: the interval is [0, 1].
    """
    values = score_array(scores)
    if is_binary(values):
        return wilson_interval(float(values.sum()), len(values), confidence=confidence)
    if len(values) == 1:
        return Interval(0.0, 1.0)
    return t_interval(values, confidence=confidence).clipped(0, 1)
