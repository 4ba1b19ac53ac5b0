"""The order in which items are scored when there may be no time for all of them.

The first n items of a file are no sample: HellaSwag's validation file begins with 3,243 rows from
one of its two sources. In the order made here, each prefix is a random sample in which each stratum
(an MMLU subject, a source) has nearly its share of the full set.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from xinslm.errors import XinslmError


def stratified_order(strata: Sequence[Hashable], seed: int) -> NDArray[np.int64]:
    """Indices of all items in random order; prefixes are nearly proportional to the strata.

    The i-th item of a random permutation of stratum h gets the key (i + u_h) / N_h, with u_h
    uniform in [0, 1); items are sorted by key. For each prefix there is a t such that each stratum
    has floor(t N_h) or floor(t N_h) + 1 items in it, or one less among equal keys: systematic
    sampling (Madow 1944) in each stratum. With one stratum it is a plain random permutation.
    """
    if not len(strata):
        raise XinslmError("strata: there is no item to order")
    rng = np.random.default_rng(seed)
    codes = stratum_codes(strata)
    shuffled = rng.permutation(len(codes))
    grouped = shuffled[np.argsort(codes[shuffled], kind="stable")]  # by stratum, random within
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(codes)) - np.repeat(starts, sizes)
    keys = (rank + np.repeat(rng.random(len(sizes)), sizes)) / np.repeat(sizes, sizes)
    return grouped[np.argsort(keys, kind="stable")].astype(np.int64)


def stratum_codes(strata: Sequence[Hashable]) -> NDArray[np.int64]:
    """0, 1, ... for the strata in order of their first item."""
    codes = {label: code for code, label in enumerate(dict.fromkeys(strata))}
    return np.fromiter(map(codes.__getitem__, strata), dtype=np.int64, count=len(strata))
