"""Chunk likelihoods: what a teacher with any other tokenizer says about stretches of text (ALM,
Minixhofer 2025).

Between two bytes where both tokenizers begin a token lies a span, and the teacher's log-likelihood
of a span is the sum of log p of its tokens: all that is needed of the teacher is log p of the text.
The cache keeps it with each stream position whose label is in the span, 6 bytes, together with the
span's length and the place in it, so that a batch that cuts a span (a row's end, a masked token)
can leave it out whole.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xinslm.alignment.spans import Pair, SpanAligner
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import Cache, gather
from xinslm.cache.scorers import RECORDS, predictions
from xinslm.data.dataset import Split
from xinslm.data.packing import Batch
from xinslm.errors import UsageError, XinslmError
from xinslm.losses.targets import SpanTargets
from xinslm.teachers.base import DenseTeacher

SPAN = np.dtype([("log_prob", "<f4"), ("size", "u1"), ("place", "u1")])
"""log p of the whole span, its number of positions (0: the position is in no span), which of them
this one is.
"""
LONGEST = 255


def span_records(pair: Pair, log_probs: np.ndarray) -> np.ndarray:
    """Records of one document, one a student token: record i is of the span that holds token i + 1.

    log_probs: (teacher tokens,) float, log p of each token, NaN where unknown. A span with such a
    token, with a control token that the teacher reads as text, or with more than 255 student tokens
    is no span.
    """
    ours, theirs = pair.student_starts[:-1], pair.teacher_starts[:-1]
    shared = np.intersect1d(ours, theirs)
    span_of_ours = np.searchsorted(shared, ours, side="right") - 1
    span_of_theirs = np.searchsorted(shared, theirs, side="right") - 1
    sizes = np.bincount(span_of_ours[span_of_ours >= 0], minlength=len(shared))
    placed = span_of_theirs >= 0
    total = np.bincount(span_of_theirs[placed], weights=log_probs[placed], minlength=len(shared))
    good = np.isfinite(total) & (sizes <= LONGEST)
    good[span_of_ours[pair.foreign & (span_of_ours >= 0)]] = False
    good[span_of_ours[:1]] = False  # nothing predicts the first token of a document
    first = np.searchsorted(span_of_ours, span_of_ours)
    known = (span_of_ours >= 0) & good[span_of_ours]
    records = np.zeros(len(ours), dtype=SPAN)
    records["log_prob"] = np.where(known, total[span_of_ours], 0.0)
    records["size"] = np.where(known, sizes[span_of_ours], 0)
    records["place"] = np.where(known, np.arange(len(ours)) - first, 0)
    return np.append(records[1:], np.zeros(1, dtype=SPAN))


def token_log_probs(
    teacher: DenseTeacher,
    tokens: np.ndarray,
    documents: np.ndarray,
    config: CacheConfig,
    tell: Callable[[int], None],
) -> np.ndarray:
    """Log p of each token of documents (offsets) by a teacher, (tokens,) float64; NaN for a
    document's first.
    """
    out = np.full(len(tokens), np.nan)
    for places, logits in predictions(teacher, tokens, documents, config, tell):
        log_p = torch.log_softmax(logits, dim=1)
        ids = torch.from_numpy(tokens[places]).to(log_p.device)
        out[places] = log_p.gather(1, ids[:, None])[:, 0].double().cpu().numpy()
        if not np.isfinite(out[places]).all():
            raise XinslmError(
                f"teacher {teacher.name}: log p of a token is not finite. Try --dtype float32, or "
                "look at the weights; "
                f"finished shards are kept"
            )
    return out


class ChunkScorer:
    """Span records from a teacher of any tokenizer; a `Scorer`."""

    def __init__(self, teacher: DenseTeacher, aligner: SpanAligner, config: CacheConfig) -> None:
        self.teacher, self.aligner, self.config = teacher, aligner, config
        self.planes: dict[str, np.dtype[Any]] = {RECORDS: SPAN}

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`; positions whose span holds a token that is no target
        have no span.
        """
        documents = np.asarray(split.documents[first : last + 1], dtype=np.int64)
        start, end = int(documents[0]), int(documents[-1])
        pairs = [self.aligner.align(np.asarray(split.tokens[a:b])) for a, b in pairwise(documents)]
        offsets = np.cumsum([0, *(len(pair.teacher_ids) for pair in pairs)])
        tokens = np.concatenate([pair.teacher_ids for pair in pairs])
        log_probs = token_log_probs(
            self.teacher, tokens, offsets, self.config, lambda seen: tell(min(seen, end - start))
        )
        cuts = zip(pairs, np.split(log_probs, offsets[1:-1]), strict=True)
        records = np.concatenate([span_records(pair, of_document) for pair, of_document in cuts])
        counts = np.append(np.asarray(split.mask[start + 1 : end]) != 0, False)
        begins = np.arange(len(records)) - records["place"]
        spoilt = np.zeros(len(records), dtype=bool)
        spoilt[begins[~counts]] = True
        records[spoilt[begins]] = np.zeros(1, dtype=SPAN)
        return {RECORDS: records}


class CachedSpans:
    """Span likelihoods of a cache, found by stream position; spans that a batch does not hold whole
    are left out.
    """

    def __init__(self, cache: Cache, name: str) -> None:
        shards = cache.manifest["shards"][name]
        if cache.manifest.get("alignment", {}).get("kind") != "chunks":
            raise UsageError(f"cache {cache.folder} holds distributions, no span likelihoods")
        self.starts = np.array([shard["start"] for shard in shards], dtype=np.int64)
        self.maps = [
            np.memmap(cache.folder / shard["file"], dtype=SPAN, mode="r") for shard in shards
        ]

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> SpanTargets:
        """Spans among the positions `chosen`, rising indices into the flattened (rows * row_length)
        batch.
        """
        stream, segments = batch.stream.ravel()[chosen], batch.segments.ravel()[chosen]
        rows = chosen // batch.stream.shape[1]
        records = gather(self.maps, self.starts, stream)
        sizes = records["size"].astype(np.int64)
        begins = np.flatnonzero((sizes > 0) & (records["place"] == 0))
        ends = begins + sizes[begins] - 1
        begins, ends = begins[ends < len(chosen)], ends[ends < len(chosen)]
        length = sizes[begins] - 1
        whole = (stream[ends] - stream[begins] == length) & (
            chosen[ends] - chosen[begins] == length
        )
        whole &= (segments[ends] == segments[begins]) & (rows[ends] == rows[begins])
        begins, length = begins[whole], length[whole] + 1
        spans = np.full(len(chosen), -1, dtype=np.int64)
        inside = np.repeat(begins - np.cumsum(length) + length, length) + np.arange(length.sum())
        spans[inside] = np.repeat(np.arange(len(begins)), length)
        log_probs = torch.from_numpy(records["log_prob"].astype(np.float32))
        return SpanTargets(torch.from_numpy(spans), log_probs).to(device)

    def count(self) -> tuple[int, int, float]:
        """Positions that are in a span, spans, and the sum of the spans' log-likelihoods."""
        firsts = [shard[(shard["size"] > 0) & (shard["place"] == 0)] for shard in self.maps]
        covered = sum(int(np.count_nonzero(shard["size"])) for shard in self.maps)
        return (
            covered,
            sum(map(len, firsts)),
            sum(float(f["log_prob"].sum(dtype=np.float64)) for f in firsts),
        )
