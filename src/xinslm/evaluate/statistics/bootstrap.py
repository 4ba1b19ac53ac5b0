"""Means of items that were drawn again, with replacement (Efron 1979), in bounded memory.

An item is a row: the scores of two models on it, or its log-likelihood and its bytes. Drawing rows
keeps the pairs together.
"""

import numpy as np

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.checks import Floats

NUM_RESAMPLES = 5000
"""Puts the end of a 95 % interval within 4 % of a standard error of where it belongs."""
_CHUNK_NUMBERS = 1 << 21
_FEW_ROWS = 64


def bootstrap_means(rows: Floats, seed: int, num_resamples: int = NUM_RESAMPLES) -> Floats:
    """Column means of resampled rows.

    Args:
        rows: one row for each item, shape (items, columns).
        seed: same seed, same resamples.
        num_resamples: how many.

    Returns:
        Shape (num_resamples, columns).

    How often each row is drawn is multinomial. If few rows differ, as with right and wrong answers,
    these counts are drawn; otherwise the indices of rows, some resamples at a time.
    """
    if num_resamples < 1:
        raise XinslmError(f"num_resamples {num_resamples}: at least one resample is needed")
    rng = np.random.default_rng(seed)
    items, columns = rows.shape
    different, frequency = np.unique(rows, axis=0, return_counts=True)
    if len(different) <= _FEW_ROWS:
        return rng.multinomial(items, frequency / items, size=num_resamples) @ different / items
    means = np.empty((num_resamples, columns))
    step = max(1, _CHUNK_NUMBERS // (items * columns))
    for at in range(0, num_resamples, step):
        size = min(step, num_resamples - at)
        chosen = rng.integers(items, size=(size, items), dtype=np.int32)
        means[at : at + size] = rows[chosen].mean(axis=1)
    return means
