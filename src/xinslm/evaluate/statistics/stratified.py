"""The full set's mean score, estimated after a part of its items was scored.

It answers the question of a run with a time limit: in which interval is the value of the full run?
The estimate is the post-stratified mean. Its interval starts from the exact one for a plain random
sample, which holds the full set's value at least as often as it says for each accuracy and each
number of items, and is made narrower by what the strata explain.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.checks import Floats, require_population, score_array
from xinslm.evaluate.statistics.intervals import Interval, hypergeometric_interval

MIN_POOLED_ITEMS = 10
"""Strata with fewer scored items are pooled with their neighbours."""
PRIOR_WEIGHT = 10.0
"""The design effect is pulled towards 1 as if this many items had been seen to have it."""

_ROUNDING = 1e-7
"""A number of items that is this close to a whole one is whole."""


@dataclass(frozen=True)
class FullSetEstimate:
    """What the full set's mean is, after `num_items` of its `population` items were scored."""

    mean: float
    interval: Interval
    """Contains the full set's mean; no width if all items were scored. How far the mean would move
    with other items is in `MeanScore`.
    """
    num_items: int
    population: int
    design_effect: float
    """Variance relative to that of right and wrong answers without strata; below 1 is narrower."""


@dataclass(frozen=True)
class StratumSums:
    """Sums of the scored items by stratum, for several samples at once.

    Shape (samples, strata); `sizes`, the items of the full set, (strata,).
    """

    counts: Floats
    scores: Floats
    squares: Floats
    sizes: Floats


def full_set_estimate(
    scores: ArrayLike,
    strata: Sequence[Hashable] | None = None,
    strata_sizes: Mapping[Hashable, int] | None = None,
    population: int | None = None,
    confidence: float = 0.95,
) -> FullSetEstimate:
    """The full set's mean with its interval; scores are between 0 and 1.

    Args:
        scores: of the scored items, a prefix of `stratified_order` or another random sample.
        strata: the stratum of each scored item; None is one stratum of `population` items.
        strata_sizes: items of the full set by stratum, for example `Counter(all_strata)`.
            Neighbours in this mapping are pooled if too few of their items were scored.
        population: items of the full set, if there are no strata.
        confidence: how often the interval shall hold the full set's mean.

    The sample must not be ended by what the scores are: time may run out, but a run that ends when
    the interval is narrow covers less often than it says.
    """
    values = score_array(scores)
    if (strata is None) != (strata_sizes is None) or (strata is None) == (population is None):
        raise XinslmError("give strata and strata_sizes, or population alone")
    if strata is None or strata_sizes is None:
        strata, strata_sizes = [""] * len(values), {"": population or 0}
    sums = _stratum_sums(values, strata, strata_sizes)
    mean, low, high, effect = estimate_from_sums(sums, confidence)
    return FullSetEstimate(
        mean=float(mean[0]),
        interval=Interval(float(low[0]), float(high[0])),
        num_items=len(values),
        population=int(sums.sizes.sum()),
        design_effect=float(effect[0]),
    )


def _stratum_sums(
    scores: Floats, strata: Sequence[Hashable], strata_sizes: Mapping[Hashable, int]
) -> StratumSums:
    if len(strata) != len(scores):
        raise XinslmError(f"{len(scores)} scores have {len(strata)} strata; each needs one")
    index = {label: code for code, label in enumerate(strata_sizes)}
    unknown = next((label for label in strata if label not in index), None)
    if unknown is not None:
        raise XinslmError(f"stratum {unknown!r} of a scored item is not in strata_sizes")
    codes = np.array([index[label] for label in strata])
    sizes = np.array(list(strata_sizes.values()), dtype=np.float64)

    def summed(values: Floats) -> Floats:
        return np.bincount(codes, values, len(sizes)).astype(np.float64)

    counts = summed(np.ones(len(scores)))
    for label, count, size in zip(strata_sizes, counts, sizes, strict=True):
        if count > size:
            raise XinslmError(
                f"stratum {label!r}: {count:.0f} items were scored, the full set has {size:.0f}"
            )
    return StratumSums(counts[None], summed(scores)[None], summed(scores**2)[None], sizes)


def estimate_from_sums(
    sums: StratumSums, confidence: float = 0.95
) -> tuple[Floats, Floats, Floats, Floats]:
    """Means, lower and upper ends and design effects of several samples of the same size.

    Groups g are strata, pooled until each has 10 scored items. With W_g = N_g / N,

        mean      m = sum_g W_g m_g
        variance  v = sum_g W_g^2 (1 - n_g / N_g) s_g^2 / n_g    (Cochran 1977, chapter 5)

    The design effect d = v / ((1 - n/N) m (1 - m) / (n - 1)) compares it with right and wrong
    answers in a plain random sample (Kish 1965). Few right or few wrong answers say little about
    d, so it is pulled towards 1 with weight 10 against 4 n m (1 - m). The interval is that of
    `hypergeometric_interval` at n m right answers, with its distances from m times sqrt(d). Ends
    are rounded outwards to whole numbers of right answers, which matters for small sets, and stay
    inside the limits that the unscored items leave.
    """
    groups = _pooled(sums)
    n, population = int(sums.counts[0].sum()), int(sums.sizes.sum())
    require_population(n, population)
    held = np.maximum(groups.counts, 1)
    means = groups.scores / held
    weights = groups.sizes / population
    mean = np.clip((weights * means).sum(axis=1), 0, 1)
    squares = np.maximum(groups.squares - groups.scores * means, 0)
    spread = squares / np.maximum(groups.counts - 1, 1)
    unscored = 1 - groups.counts / np.maximum(groups.sizes, 1)
    effect = _design_effect(
        mean, (weights**2 * unscored * spread / held).sum(axis=1), n, population
    )
    low, high = _exact_limits(mean * n, n, population, confidence)
    low, high = (mean + np.sqrt(effect) * (end - mean) for end in (low, high))
    low = np.floor(low * population + _ROUNDING) / population
    high = np.ceil(high * population - _ROUNDING) / population
    total = sums.scores.sum(axis=1)
    least = np.minimum(total / population, mean)
    most = np.maximum((total + population - n) / population, mean)
    return mean, np.maximum(low, least), np.minimum(high, most), effect


def _pooled(sums: StratumSums) -> StratumSums:
    """Neighbouring strata summed until each group has enough items; sizes by sample, too.

    A group ends when it has enough and enough are left for the next one.
    """
    samples, strata = sums.counts.shape
    group = np.zeros(samples, dtype=np.int64)
    filled = np.zeros(samples)
    left = sums.counts.sum(axis=1)
    places = np.empty((samples, strata), dtype=np.int64)
    for stratum in range(strata):
        places[:, stratum] = group
        filled += sums.counts[:, stratum]
        left = left - sums.counts[:, stratum]
        ends = (filled >= MIN_POOLED_ITEMS) & (left >= MIN_POOLED_ITEMS)
        group = group + ends
        filled[ends] = 0
    flat = (places + np.arange(samples)[:, None] * strata).ravel()

    def summed(values: Floats) -> Floats:
        total = np.bincount(flat, values.ravel(), samples * strata)
        return total.astype(np.float64).reshape(samples, strata)

    sizes = np.broadcast_to(sums.sizes, places.shape)
    return StratumSums(
        summed(sums.counts), summed(sums.scores), summed(sums.squares), summed(sizes)
    )


def _design_effect(mean: Floats, variance: Floats, num_items: int, population: int) -> Floats:
    """The variance relative to that of a plain random sample of right and wrong answers."""
    plain = (1 - num_items / population) * mean * (1 - mean) / max(num_items - 1, 1)
    known = plain > 0
    observed = np.where(known, variance / np.where(known, plain, 1), 1)
    weight = 4 * num_items * mean * (1 - mean)
    return (weight * observed + PRIOR_WEIGHT) / (weight + PRIOR_WEIGHT)


def _exact_limits(
    successes: Floats, num_items: int, population: int, confidence: float
) -> tuple[Floats, Floats]:
    """Ends of the exact intervals, linear between neighbouring numbers of right answers."""
    below = np.clip(np.floor(successes + 1e-9), 0, num_items).astype(np.int64)
    above = np.minimum(below + 1, num_items)
    needed = np.unique(np.concatenate([below, above]))
    exact = [
        hypergeometric_interval(int(count), num_items, population, confidence) for count in needed
    ]
    share = np.clip(successes - below, 0, 1)
    low, high = (
        (1 - share) * ends[np.searchsorted(needed, below)]
        + share * ends[np.searchsorted(needed, above)]
        for ends in (np.array([e.low for e in exact]), np.array([e.high for e in exact]))
    )
    return low, high
