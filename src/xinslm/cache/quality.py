"""Whether the teacher of a cache predicts the dataset better than token frequencies alone."""

import numpy as np

from xinslm.baseline import uninformed
from xinslm.cache.bucket_entries import bucket_maps
from xinslm.cache.entries import FP16_FLOOR, VALID, Cache, gather
from xinslm.data.dataset import Dataset
from xinslm.data.unigram import unigram_nats

BLOCKS, BLOCK = 64, 1 << 14


def teacher_warning(cache: Cache, dataset: Dataset) -> str | None:
    """Say so if the teacher knows nothing about the training text; None if it does."""
    name = f"teacher {cache.manifest['config']['teacher']}"
    return uninformed(
        name, teacher_nats(cache), unigram_nats(dataset, "train"), "nats per target token"
    )


def teacher_nats(cache: Cache) -> float | None:
    """The teacher's nats per target token of the train split, from at most a million entries; None
    if the cache does not hold them.
    """
    shards = cache.manifest["shards"]["train"]
    if cache.manifest.get("alignment", {}).get("kind") == "byte_prefix":
        maps = bucket_maps(cache, "train")
    else:
        split = cache.split("train")
        maps = [] if split is None else split.maps
    if not maps or "log_label" not in (maps[0].dtype.names or ()):
        return None
    starts = np.array([shard["start"] for shard in shards], np.int64)
    stored = gather(maps, starts, sample(int(starts[-1]) + len(maps[-1])))
    log_label = stored["log_label"][(stored["flags"] & VALID) != 0].astype(np.float64)
    known = log_label[log_label > FP16_FLOOR]
    return -float(known.mean()) if len(known) else None


def sample(count: int) -> np.ndarray:
    """Stream positions below `count`, at most a million: evenly spread blocks."""
    if count <= BLOCKS * BLOCK:
        return np.arange(count)
    starts = np.linspace(0, count - BLOCK, BLOCKS).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(BLOCK)).ravel())
