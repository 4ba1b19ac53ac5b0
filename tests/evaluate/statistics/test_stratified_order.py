"""The order of items: a permutation whose prefixes are proportional, random and unbiased."""

import math
from collections import Counter

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics import stratified_order

SIZES = {"law": 153, "art": 10, "physics": 41, "logic": 3, "lone": 1}
STRATA = [label for label, size in SIZES.items() for _ in range(size)]


def test_it_is_a_permutation_that_follows_from_the_seed():
    order = stratified_order(STRATA, seed=3)
    assert sorted(order) == list(range(len(STRATA)))
    assert (order == stratified_order(STRATA, seed=3)).all()
    assert (order != stratified_order(STRATA, seed=4)).any()


def test_each_prefix_has_nearly_the_share_of_each_stratum():
    """Some t has floor(t N_h) or floor(t N_h) + 1 items in each stratum, for each prefix."""
    for seed in range(20):
        counts = dict.fromkeys(SIZES, 0)
        for index in stratified_order(STRATA, seed):
            counts[STRATA[index]] += 1
            low = max((count - 1) / SIZES[label] for label, count in counts.items())
            high = min((count + 1) / SIZES[label] for label, count in counts.items())
            assert low < high
            n = sum(counts.values())
            for label, count in counts.items():
                share = n * SIZES[label] / len(STRATA)
                assert abs(count - share) < 1 + len(SIZES) * SIZES[label] / len(STRATA)


def test_each_item_is_as_likely_as_any_other_to_be_in_a_prefix():
    repeats, n = 1000, 50
    seen = Counter()
    for seed in range(repeats):
        seen.update(stratified_order(STRATA, seed)[:n].tolist())
    share = np.array([seen[i] for i in range(len(STRATA))]) / repeats
    expected = n / len(STRATA)
    sigma = math.sqrt(expected * (1 - expected) / repeats)
    law, physics = share[:153], share[163:204]
    assert np.abs(law - expected).max() < 5 * sigma
    assert np.abs(physics - expected).max() < 5 * sigma
    assert abs(share[-1] - expected) < 4 * sigma  # a stratum of one item


def test_one_stratum_is_a_plain_permutation():
    """All six orders of three items are equally frequent: chi-square below its 0.1 % point."""
    found = Counter(tuple(stratified_order(["x"] * 3, seed).tolist()) for seed in range(1200))
    assert len(found) == 6
    assert sum((count - 200) ** 2 / 200 for count in found.values()) < 20.5


def test_labels_may_be_anything_that_can_be_compared():
    assert len(stratified_order([1, "a", None, ("b", 2), 1], seed=0)) == 5
    with pytest.raises(XinslmError, match="no item to order"):
        stratified_order([], seed=0)


def test_the_first_rows_of_a_file_are_mixed():
    """HellaSwag's validation file begins with all 3,243 rows of the smaller source."""
    strata = ["activitynet"] * 3243 + ["wikihow"] * 6799
    first = stratified_order(strata, seed=0)[:1000]
    assert abs((first < 3243).sum() - 323) <= 1
