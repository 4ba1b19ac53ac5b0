"""The cache of a teacher that is known over groups of the student's tokens: `--alignment prefixes`.

One record for each stream position, as in `records`: k groups, ranges of the vocabulary in the
order of its bytes, with their levels and 8-bit codes of -log p. 123 bytes with k=20 and a
vocabulary up to 65,535.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xinslm.alignment.byte_prefix import LEVELS, Group, PrefixAligner
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import FP16_FLOOR, LARGEST_NEGATIVE_LOG, VALID, Cache, gather
from xinslm.cache.scorers import RECORDS, predictions
from xinslm.data.dataset import Split
from xinslm.data.packing import Batch
from xinslm.errors import UsageError, XinslmError
from xinslm.losses.targets import GroupTargets
from xinslm.teachers.base import DenseTeacher
from xinslm.topk import most_likely

GROUPS = 20
"""Groups of a record where --head does not say."""
ONWARD = 128
"""Bit of `levels`: the next level's set is this group."""
CANDIDATES = 32
"""Likeliest tokens that are looked at in each of the teacher's places."""


def group_dtype(vocab_size: int, groups: int) -> np.dtype[Any]:
    """Packed little-endian record."""
    place = "<u2" if vocab_size < 1 << 16 else "<u4"
    return np.dtype(
        [
            ("log_label", "<f2"),
            ("flags", "u1"),
            ("begins", place, (groups,)),
            ("ends", place, (groups,)),
            ("levels", "u1", (groups,)),
            ("codes", "u1", (groups,)),
        ]
    )


def code(p: np.ndarray) -> np.ndarray:
    """8-bit codes of probabilities, finest where they are large."""
    with np.errstate(divide="ignore"):
        negative_log = np.clip(-np.log(p), 0.0, LARGEST_NEGATIVE_LOG)
    return np.round(255 * np.sqrt(negative_log / LARGEST_NEGATIVE_LOG)).astype(np.uint8)


def group_records(
    said: list[list[Group]], told: np.ndarray, counts: np.ndarray, dtype: np.dtype[Any]
) -> np.ndarray:
    """Records of one document, one a token: record i is of token i + 1; those that are no targets
    stay empty.

    Groups that the next level is inside are kept before others, and likelier ones. A level to which
    no way is kept is left out.
    """
    records = np.zeros(len(said) + 1, dtype=dtype)
    most = records["begins"].shape[1]
    shape = (len(records), most)
    begins, ends, levels, probs = (
        np.zeros(shape, kind) for kind in (np.int64, np.int64, np.uint8, np.float64)
    )
    for number, groups in enumerate(said):
        if not groups or not counts[number]:
            continue
        records["flags"][number] = VALID
        ways = sorted((group for group in groups if group[3]), key=lambda group: group[2])
        last = ways[most][2] if len(ways) > most else LEVELS
        others = sorted(
            (group for group in groups if not group[3] and group[2] <= last),
            key=lambda group: -group[4],
        )
        kept = [*ways[:most], *others][:most]
        for column, (begin, end, level, onward, p) in enumerate(kept):
            begins[number, column], ends[number, column], probs[number, column] = begin, end, p
            levels[number, column] = level | (ONWARD if onward else 0)
    records["begins"], records["ends"], records["levels"], records["codes"] = (
        begins,
        ends,
        levels,
        code(probs),
    )
    records["log_label"][:-1] = np.where(np.isfinite(told), told, FP16_FLOOR)
    return records


class GroupScorer:
    """Group records from a teacher of any tokenizer; a `Scorer`."""

    def __init__(
        self, teacher: DenseTeacher, aligner: PrefixAligner, config: CacheConfig, groups: int
    ) -> None:
        self.teacher, self.aligner, self.config = teacher, aligner, config
        self.planes: dict[str, np.dtype[Any]] = {RECORDS: group_dtype(len(aligner.order), groups)}

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
        records = []
        for text, pair, (a, b), (low, high) in zip(
            texts, pairs, pairwise(documents), pairwise(offsets), strict=True
        ):
            groups, told = self.aligner.groups(text, pair, *(array[low:high] for array in said))
            counts = np.asarray(split.mask[a + 1 : b]) != 0
            records.append(group_records(groups, told, counts, self.planes[RECORDS]))
        return {RECORDS: np.concatenate(records)}

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
            values, found = most_likely(p, most)
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


def group_maps(cache: Cache, name: str) -> list[Any]:
    """A split's records, a map for each shard."""
    if cache.manifest.get("alignment", {}).get("kind") != PrefixAligner.kind:
        raise UsageError(f"cache {cache.folder} holds no groups of tokens")
    cache.check()
    dtype = group_dtype(cache.format.vocab_size, cache.format.head)
    shards = cache.manifest["shards"][name]
    return [np.memmap(cache.folder / shard["file"], dtype=dtype, mode="r") for shard in shards]


def count_groups(maps: list[Any]) -> tuple[int, float, int]:
    """Positions that say something, the sum of log p of their texts where it is known, and how many
    those are.
    """
    valid = [shard[(shard["flags"] & VALID) != 0] for shard in maps]
    told = np.concatenate([records["log_label"].astype(np.float64) for records in valid])
    told = told[told > FP16_FLOOR]
    return sum(map(len, valid)), float(told.sum()), len(told)


class CachedGroups:
    """Groups of a cache, found by stream position: any shuffling of rows is harmless."""

    def __init__(self, cache: Cache, name: str, order: np.ndarray) -> None:
        """`order` is the `byte_order` of the dataset's tokenizer."""
        self.maps, self.order = group_maps(cache, name), torch.from_numpy(order)
        self.starts = np.array(
            [shard["start"] for shard in cache.manifest["shards"][name]], dtype=np.int64
        )

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> GroupTargets:
        """Distributions for the positions `chosen`, indices into the flattened (rows * row_length)
        batch.
        """
        return decode_groups(
            gather(self.maps, self.starts, batch.stream.ravel()[chosen]), self.order
        ).to(device)


def decode_groups(records: np.ndarray, order: torch.Tensor) -> GroupTargets:
    """Turn N records into tensors for the loss, the masses and the rest scaled to sum to 1."""
    begins, ends = records["begins"].astype(np.int64), records["ends"].astype(np.int64)
    probs = np.exp(-LARGEST_NEGATIVE_LOG * (records["codes"].astype(np.float32) / 255) ** 2) * (
        ends > begins
    )
    levels = (records["levels"] & ~np.uint8(ONWARD)).astype(np.int64)
    # codes round: no level may have more than all
    for level in range(int(levels.max(initial=0)) + 1):
        here = levels == level
        probs /= np.where(here, np.maximum((probs * here).sum(axis=1, keepdims=True), 1.0), 1.0)
    return GroupTargets(
        order,
        torch.from_numpy(begins),
        torch.from_numpy(ends),
        torch.from_numpy(probs),
        torch.from_numpy(levels),
        torch.from_numpy((records["levels"] & ONWARD) != 0),
        torch.from_numpy((records["flags"] & VALID) != 0),
    )
