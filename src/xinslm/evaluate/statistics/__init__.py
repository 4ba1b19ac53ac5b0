"""The statistics of benchmark results: intervals, sampling order, comparison of two models.

Two questions are kept apart: in which interval is the value of the full set, after a part of it was
scored (`full_set_estimate`), and how far would the value move with other items of the same kind
(`mean_score`, `generalisation_interval`). All functions take one number for each item and know
nothing about models. Random numbers follow from the seed.

    order = stratified_order(subjects, seed=0)          # score items in this order
    estimate = full_set_estimate(scores, subjects_of_scored, Counter(subjects))
    comparison = compare_answers(student_right, teacher_right, seed=0)
"""

from xinslm.evaluate.statistics.bits import BitsPerByte, bits_per_byte
from xinslm.evaluate.statistics.detectable import (
    detectable_from_error,
    detectable_paired,
    detectable_unpaired,
)
from xinslm.evaluate.statistics.intervals import (
    Interval,
    hypergeometric_interval,
    t_interval,
    wilson_interval,
)
from xinslm.evaluate.statistics.mean import (
    MeanScore,
    generalisation_interval,
    group_mean_score,
    mean_score,
)
from xinslm.evaluate.statistics.order import stratified_order
from xinslm.evaluate.statistics.paired import (
    AnswerComparison,
    ScoreComparison,
    compare_answers,
    compare_scores,
)
from xinslm.evaluate.statistics.retained import RetainedShare, retained_share
from xinslm.evaluate.statistics.stratified import FullSetEstimate, full_set_estimate

__all__ = [
    "AnswerComparison",
    "BitsPerByte",
    "FullSetEstimate",
    "Interval",
    "MeanScore",
    "RetainedShare",
    "ScoreComparison",
    "bits_per_byte",
    "compare_answers",
    "compare_scores",
    "detectable_from_error",
    "detectable_paired",
    "detectable_unpaired",
    "full_set_estimate",
    "generalisation_interval",
    "group_mean_score",
    "hypergeometric_interval",
    "mean_score",
    "retained_share",
    "stratified_order",
    "t_interval",
    "wilson_interval",
]
