"""The cache of a teacher that is known over buckets of the student's tokens: `--alignment
byte_prefix`.

One entry for each stream position, as in `entries`: k buckets, ranges of the vocabulary in the
order of its bytes, with their levels and 8-bit codes of -log p. 123 bytes with k=20 and a
vocabulary up to 65,535.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xinslm.alignment.byte_prefix import LEVELS, Bucket, BytePrefixAligner
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import FP16_FLOOR, LARGEST_NEGATIVE_LOG, VALID, Cache, gather
from xinslm.cache.scorers import ENTRIES, predictions
from xinslm.data.dataset import Split
from xinslm.data.packing import Batch
from xinslm.errors import UsageError, XinslmError
from xinslm.losses.targets import BucketTargets
from xinslm.teachers.base import DenseTeacher
from xinslm.topk import blocked_topk

DEFAULT_BUCKETS = 20
"""Buckets of an entry where --top-k does not say."""
ONWARD = 128
"""Bit of `levels`: the next level's set is this bucket."""
CANDIDATES = 32
"""Likeliest tokens that are looked at in each of the teacher's places."""


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
    """8-bit codes of probabilities, finest where they are large."""
    with np.errstate(divide="ignore"):
        negative_log = np.clip(-np.log(p), 0.0, LARGEST_NEGATIVE_LOG)
    return np.round(255 * np.sqrt(negative_log / LARGEST_NEGATIVE_LOG)).astype(np.uint8)


def bucket_entries(
    said: list[list[Bucket]], label_log_probs: np.ndarray, counts: np.ndarray, dtype: np.dtype[Any]
) -> np.ndarray:
    """Entries of one document, one a token: entry i is of token i + 1; those that are no targets
    stay empty.

    Buckets that the next level is inside are kept before others, and likelier ones. A level to
    which no way is kept is left out.
    """
    entries = np.zeros(len(said) + 1, dtype=dtype)
    most = entries["begins"].shape[1]
    shape = (len(entries), most)
    begins, ends, levels, probs = (
        np.zeros(shape, kind) for kind in (np.int64, np.int64, np.uint8, np.float64)
    )
    for number, buckets in enumerate(said):
        if not buckets or not counts[number]:
            continue
        entries["flags"][number] = VALID
        ways = sorted((bucket for bucket in buckets if bucket[3]), key=lambda bucket: bucket[2])
        last = ways[most][2] if len(ways) > most else LEVELS
        others = sorted(
            (bucket for bucket in buckets if not bucket[3] and bucket[2] <= last),
            key=lambda bucket: -bucket[4],
        )
        kept = [*ways[:most], *others][:most]
        for column, (begin, end, level, onward, p) in enumerate(kept):
            begins[number, column], ends[number, column], probs[number, column] = begin, end, p
            levels[number, column] = level | (ONWARD if onward else 0)
    entries["begins"], entries["ends"], entries["levels"], entries["codes"] = (
        begins,
        ends,
        levels,
        code(probs),
    )
    entries["log_label"][:-1] = np.where(np.isfinite(label_log_probs), label_log_probs, FP16_FLOOR)
    return entries


class BucketScorer:
    """Bucket entries from a teacher of any tokenizer; a `Scorer`."""

    def __init__(
        self, teacher: DenseTeacher, aligner: BytePrefixAligner, config: CacheConfig, buckets: int
    ) -> None:
        self.teacher, self.aligner, self.config = teacher, aligner, config
        self.arrays: dict[str, np.dtype[Any]] = {ENTRIES: bucket_dtype(len(aligner.order), buckets)}

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`."""
        documents = np.asarray(split.documents[first : last + 1], dtype=np.int64)
        start, end = int(documents[0]), int(documents[-1])
        texts = [np.asarray(split.tokens[a:b]).astype(np.int64) for a, b in pairwise(documents)]
        pairs = [self.aligner.align(text) for text in texts]
        offsets = np.cumsum([0, *(len(pair.teacher_ids) for pair in pairs)])
        tokens = np.concatenate([pair.teacher_ids for pair in pairs])
        said = self._predictions(tokens, offsets, lambda seen: tell(min(seen, end - start)))
        entries = []
        for text, pair, (a, b), (low, high) in zip(
            texts, pairs, pairwise(documents), pairwise(offsets), strict=True
        ):
            buckets, label_log_probs = self.aligner.buckets(
                text, pair, *(array[low:high] for array in said)
            )
            counts = np.asarray(split.mask[a + 1 : b]) != 0
            entries.append(bucket_entries(buckets, label_log_probs, counts, self.arrays[ENTRIES]))
        return {ENTRIES: np.concatenate(entries)}

    def _predictions(
        self, tokens: np.ndarray, documents: np.ndarray, tell: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each token its place's likeliest ids and their probabilities, (tokens, m), and its
        own, (tokens,).

        A document's first token has NaN: nothing predicts it.
        """
        most = min(CANDIDATES, self.teacher.vocab_size)
        ids, probs = (
            np.zeros((len(tokens), most), np.int32),
            np.zeros((len(tokens), most), np.float32),
        )
        own = np.full(len(tokens), np.nan)
        for places, logits in predictions(self.teacher, tokens, documents, self.config, tell):
            p = torch.softmax(logits, dim=1)
            values, found = blocked_topk(p, most)
            ids[places], probs[places] = found.cpu().numpy(), values.cpu().numpy()
            own[places] = (
                p.gather(1, torch.from_numpy(tokens[places]).to(p.device)[:, None])[:, 0]
                .cpu()
                .numpy()
            )
            if not np.isfinite(own[places]).all():
                raise XinslmError(
                    f"teacher {self.teacher.name}: the probability of a token is not finite. Try "
                    "--dtype float32, or "
                    f"look at the weights; finished shards are kept"
                )
        return ids, probs, own


def bucket_maps(cache: Cache, name: str) -> list[Any]:
    """A split's entries, a map for each shard."""
    if cache.manifest.get("alignment", {}).get("kind") != BytePrefixAligner.kind:
        raise UsageError(f"cache {cache.folder} holds no buckets of tokens")
    cache.check()
    dtype = bucket_dtype(cache.format.vocab_size, cache.format.top_k)
    shards = cache.manifest["shards"][name]
    return [np.memmap(cache.folder / shard["file"], dtype=dtype, mode="r") for shard in shards]


def count_buckets(maps: list[Any]) -> tuple[int, float, int]:
    """Positions that say something, the sum of log p of their texts where it is known, and how many
    those are.
    """
    valid = [shard[(shard["flags"] & VALID) != 0] for shard in maps]
    label_log_probs = np.concatenate([entries["log_label"].astype(np.float64) for entries in valid])
    label_log_probs = label_log_probs[label_log_probs > FP16_FLOOR]
    return sum(map(len, valid)), float(label_log_probs.sum()), len(label_log_probs)


class CachedBuckets:
    """Buckets of a cache, found by stream position: any shuffling of rows is harmless."""

    def __init__(self, cache: Cache, name: str, order: np.ndarray) -> None:
        """`order` is the `byte_order` of the dataset's tokenizer."""
        self.maps, self.order = bucket_maps(cache, name), torch.from_numpy(order)
        self.starts = np.array(
            [shard["start"] for shard in cache.manifest["shards"][name]], dtype=np.int64
        )

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> BucketTargets:
        """Distributions for the positions `chosen`, indices into the flattened (rows * row_length)
        batch.
        """
        return decode_buckets(
            gather(self.maps, self.starts, batch.stream.ravel()[chosen]), self.order
        ).to(device)


def decode_buckets(entries: np.ndarray, order: torch.Tensor) -> BucketTargets:
    """Turn N entries into tensors for the loss, the masses and the rest scaled to sum to 1."""
    begins, ends = entries["begins"].astype(np.int64), entries["ends"].astype(np.int64)
    probs = np.exp(-LARGEST_NEGATIVE_LOG * (entries["codes"].astype(np.float32) / 255) ** 2) * (
        ends > begins
    )
    levels = (entries["levels"] & ~np.uint8(ONWARD)).astype(np.int64)
    # codes round: no level may have more than all
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
