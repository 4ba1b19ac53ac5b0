"""Cache entries over buckets of the student's tokens: `--alignment byte_prefix`.

One entry for each stream position, as in `entries`: k buckets, which are ranges of the vocabulary
in byte order, with their levels and 8-bit codes of -log p. 123 bytes with k=20 and a vocabulary up
to 65,535.
"""

from typing import Any

import numpy as np
import torch

from xinslm.alignment.byte_prefix import LEVELS, Bucket
from xinslm.cache.entries import FP16_FLOOR, LARGEST_NEGATIVE_LOG, VALID
from xinslm.losses.targets import BucketTargets

DEFAULT_BUCKETS = 20
"""Buckets of an entry if --top-k is not given."""
ONWARD = 128
"""Bit of `levels`: the next level divides this bucket."""


def bucket_dtype(vocab_size: int, buckets: int) -> np.dtype[Any]:
    """Packed little-endian entry."""
    place = "<u2" if vocab_size < 1 << 16 else "<u4"
    return np.dtype(
        [
            ("log_label", "<f2"),
            ("flags", "u1"),
            ("begins", place, (buckets,)),
            ("ends", place, (buckets,)),
            ("levels", "u1", (buckets,)),
            ("codes", "u1", (buckets,)),
        ]
    )


def code(p: np.ndarray) -> np.ndarray:
    """8-bit codes of probabilities, finest for large ones."""
    with np.errstate(divide="ignore"):
        negative_log = np.clip(-np.log(p), 0.0, LARGEST_NEGATIVE_LOG)
    return np.round(255 * np.sqrt(negative_log / LARGEST_NEGATIVE_LOG)).astype(np.uint8)


def bucket_entries(
    found: list[list[Bucket]], label_log_probs: np.ndarray, counts: np.ndarray, dtype: np.dtype[Any]
) -> np.ndarray:
    """Entries of one document: entry i describes token i + 1, if that is a target.

    Buckets that the next level divides are kept first, then the most likely ones. A level is left
    out if the bucket that it divides is.
    """
    entries = np.zeros(len(found) + 1, dtype=dtype)
    most = entries["begins"].shape[1]
    probs = np.zeros((len(entries), most))
    for number, buckets in enumerate(found):
        if not buckets or not counts[number]:
            continue
        entries["flags"][number] = VALID
        divided = sorted((bucket for bucket in buckets if bucket[3]), key=lambda bucket: bucket[2])
        last = divided[most][2] if len(divided) > most else LEVELS
        others = [bucket for bucket in buckets if not bucket[3] and bucket[2] <= last]
        others.sort(key=lambda bucket: -bucket[4])
        kept = [*divided[:most], *others][:most]
        for column, (begin, end, level, onward, p) in enumerate(kept):
            entries["begins"][number, column], entries["ends"][number, column] = begin, end
            entries["levels"][number, column] = level | (ONWARD if onward else 0)
            probs[number, column] = p
    entries["codes"] = code(probs)
    entries["log_label"][:-1] = np.where(np.isfinite(label_log_probs), label_log_probs, FP16_FLOOR)
    return entries


def decode_buckets(entries: np.ndarray, order: torch.Tensor) -> BucketTargets:
    """Convert N entries for the loss, masses of a level summing to <= 1. order: `byte_order`."""
    begins, ends = entries["begins"].astype(np.int64), entries["ends"].astype(np.int64)
    probs = np.exp(-LARGEST_NEGATIVE_LOG * (entries["codes"].astype(np.float32) / 255) ** 2)
    probs *= ends > begins
    levels = (entries["levels"] & ~np.uint8(ONWARD)).astype(np.int64)
    # rounded codes may sum to more than 1
    for level in range(int(levels.max(initial=0)) + 1):
        here = levels == level
        probs /= np.where(here, np.maximum((probs * here).sum(axis=1, keepdims=True), 1.0), 1.0)
    return BucketTargets(
        order,
        torch.from_numpy(begins),
        torch.from_numpy(ends),
        torch.from_numpy(probs),
        torch.from_numpy(levels),
        torch.from_numpy((entries["levels"] & ONWARD) != 0),
        torch.from_numpy((entries["flags"] & VALID) != 0),
    )
