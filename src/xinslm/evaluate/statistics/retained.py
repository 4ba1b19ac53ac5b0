"""How much of its teacher's score a student keeps."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xinslm.evaluate.statistics.bootstrap import (
    NUM_RESAMPLES,
    bootstrap_means,
    percentile_interval,
)
from xinslm.evaluate.statistics.checks import finite_array, require_same_items
from xinslm.evaluate.statistics.distributions import two_sided_normal
from xinslm.evaluate.statistics.intervals import Interval
from xinslm.evaluate.statistics.mean import mean_score


@dataclass(frozen=True)
class RetainedShare:
    """The student's mean score as a share of the teacher's; above 1 the student is better."""

    share: float
    interval: Interval
    """Paired bootstrap over the items, 95 % by default."""


def retained_share(
    student: ArrayLike,
    teacher: ArrayLike,
    chance: ArrayLike = 0.0,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> RetainedShare | None:
    """(student - chance) / (teacher - chance), from the scores of both for the same items.

    Args:
        student: its score for each item.
        teacher: the same for the teacher.
        chance: the score of a guess, for all items or for each: 0.25 with four choices. 0 gives
            the plain quotient student / teacher.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.
        confidence: of the interval.

    None if the teacher is not above chance by more than the error of its mean (z standard errors,
    1.96 at 95 %), or has one item: a share of nothing is no number. The same if the bootstrap finds
    no end of the interval, because the teacher is at or below chance too often.
    """
    scores = [finite_array(student, "student"), finite_array(teacher, "teacher")]
    guess = np.asarray(chance, dtype=np.float64)
    guess = finite_array(np.full(len(scores[0]), guess) if guess.ndim == 0 else guess, "chance")
    require_same_items([*scores, guess], ["student", "teacher", "chance"])
    rows = np.stack(scores, axis=1) - guess[:, None]
    above = mean_score(rows[:, 1])
    error = above.standard_error
    if error is None or above.mean <= two_sided_normal(confidence) * error:
        return None
    means = bootstrap_means(rows, seed, num_resamples)
    possible = means[:, 1] > 0
    shares = np.where(possible, means[:, 0] / np.where(possible, means[:, 1], 1), np.inf)
    interval = percentile_interval(shares, len(rows), confidence)
    if not np.isfinite(interval.high):
        return None
    return RetainedShare(float(rows[:, 0].mean() / above.mean), interval)
