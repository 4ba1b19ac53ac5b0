"""Whether the teacher of a cache predicts the dataset better than token frequencies alone."""

import numpy as np

from xinslm.baseline import uninformed
from xinslm.cache.entries import VALID
from xinslm.cache.folder import Cache
from xinslm.cache.kinds import kind_of, known_log_labels
from xinslm.data.dataset import Dataset
from xinslm.data.unigram import unigram_nats

BLOCKS, BLOCK = 64, 1 << 14


def teacher_warning(cache: Cache, dataset: Dataset) -> str | None:
    """A warning if the teacher is no better than token frequencies on the training text."""
    name = f"teacher {cache.manifest['config']['teacher']}"
    baseline = unigram_nats(dataset, "train")
    return uninformed(name, teacher_nats(cache), baseline, "nats per target token")


def teacher_nats(cache: Cache, name: str = "train") -> float | None:
    """The teacher's nats per target of a split, from at most a million entries; None if unknown."""
    split = kind_of(cache).splits().get(name)
    if split is None:
        return None
    stored = split.fixed(sample(len(split)))
    known = known_log_labels(stored[(stored["flags"] & VALID) != 0])
    return -float(known.mean()) if len(known) else None


def sample(count: int) -> np.ndarray:
    """Stream positions below `count`, at most a million: evenly spread blocks."""
    if count <= BLOCKS * BLOCK:
        return np.arange(count)
    starts = np.linspace(0, count - BLOCK, BLOCKS).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(BLOCK)).ravel())
