"""What `cache` asks of a scorer, and the scorer of a teacher that gives its full distributions.

An array holds one fixed-size item for each position of the token stream. Every cache has the array
`entries`; others (projected hidden states) have files of their own. Sequences are batched by
length, the LM head is applied to a few hundred rows at a time, and only positions whose next token
is a target are scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from xinslm.alignment.nested import NestedProjection
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import ENTRIES, CacheFormat, encode
from xinslm.cache.folder import HIDDEN_STATES
from xinslm.cache.journal import ShardJournal
from xinslm.cache.projected_states import HiddenStateFormat, HiddenStateWriter
from xinslm.cache.support import Support, top_k_ids
from xinslm.data.dataset import Split
from xinslm.data.packing import sequences
from xinslm.errors import XinslmError
from xinslm.teachers.base import DenseTeacher, HiddenTeacher
from xinslm.teachers.local import batches_by_length

LOGITS_AT_ONCE = 1 << 23
"""Numbers in one block of logits (32 MiB of float32)."""
ROWS_AT_ONCE = 32
"""Rows of it that are encoded together: what they become stays in the processor's cache, and the
memory of the last ones is used again.
"""


class Scorer(Protocol):
    """Scores runs of documents. The result depends only on the documents, so that shards can be
    made again.
    """

    arrays: dict[str, np.dtype[Any]]
    """Name of each array -> type of one position's item; `entries` is one of them."""

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, report: Callable[[int], None], /
    ) -> dict[str, np.ndarray]:
        """Arrays of documents `first` to `last` (not included), one item per token.

        `scratch` is a file for the scorer that survives an interruption and is deleted when the
        shard is written; `report` takes the number of tokens done so far in this shard.
        """
        ...


def cut_documents(documents: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Ranges of documents of about `size` tokens each; documents: offsets (n+1,)."""
    cuts, first, count = [], 0, len(documents) - 1
    while first < count:
        last = int(np.searchsorted(documents, int(documents[first]) + size, side="left"))
        last = min(max(last, first + 1), count)
        cuts.append((first, last))
        first = last
    return cuts


@dataclass(frozen=True)
class Work:
    """Documents as the teacher reads them, and which of its rows predict which stream position."""

    tokens: np.ndarray
    """Teacher ids of the documents, concatenated."""
    documents: np.ndarray
    """Offsets of the documents in `tokens`."""
    start: int
    """Stream position of the first document."""
    positions: np.ndarray
    """Stream positions to score."""
    labels: np.ndarray
    """Their labels, in the dataset's vocabulary."""
    rows: np.ndarray
    """For each position, the row of `tokens` whose prediction covers it; non-decreasing."""
    prefixes: np.ndarray | None
    """For each position, the number of the student pieces of a teacher token that precede it, 0 at
    a boundary of the teacher; None if the tokenizers are the same."""
    kept: np.ndarray | None = None
    """Indices of these positions among the documents' targets, if some are uncovered."""


class DenseScorer:
    """Sparse entries from a teacher that gives logits over its full vocabulary."""

    def __init__(
        self,
        teacher: DenseTeacher,
        projection: NestedProjection | None,
        fmt: CacheFormat,
        config: CacheConfig,
        hidden_state_format: HiddenStateFormat | None = None,
        support: Support | None = None,
    ) -> None:
        """With `hidden_state_format`, the teacher must be a `HiddenTeacher`; `support` selects the
        tokens of the top k.
        """
        self.teacher, self.projection, self.format, self.config = teacher, projection, fmt, config
        self.hidden_state_format, self.support = hidden_state_format, support
        self.arrays: dict[str, np.dtype[Any]] = {ENTRIES: fmt.dtype}
        if hidden_state_format is not None:
            self.arrays[HIDDEN_STATES] = hidden_state_format.dtype

    def shard(
        self,
        split: Split,
        first: int,
        last: int,
        scratch: Path | None,
        report: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`; positions that are not targets keep flag 0."""
        start, end = int(split.documents[first]), int(split.documents[last])
        work = _work(split, first, last, self.projection)
        support = None if self.support is None else self.support.of(split, first, last)
        if support is not None and work.kept is not None:
            support = support[work.kept]
        arrays = {name: np.zeros(end - start, item) for name, item in self.arrays.items()}
        starts, lengths = sequences(work.documents, self.config.max_seq_length)
        seen = 0
        with ShardJournal(scratch) as journal:
            for step, batch in enumerate(batches_by_length(lengths, self.config.batch_tokens)):
                which, of_state = covered_by(work.rows, starts[batch], lengths[batch])
                places = work.positions[which] - start
                if not journal.restore(step, places, arrays):
                    texts = [work.tokens[starts[k] : starts[k] + lengths[k]] for k in batch]
                    self._score(work, texts, which, of_state, support, arrays)
                    journal.keep(step, places, arrays)
                seen += int(lengths[batch].sum())
                report(min(seen, end - start))
        return arrays

    def _score(
        self,
        work: Work,
        texts: list[np.ndarray],
        which: np.ndarray,
        of_state: np.ndarray,
        support: np.ndarray | None,
        arrays: dict[str, np.ndarray],
    ) -> None:
        """Fill the arrays at the positions `which`, predicted by rows `of_state` of the texts."""
        try:
            if self.hidden_state_format is None:
                states = self.teacher.states(texts)
            else:
                fmt = self.hidden_state_format
                teacher = cast(HiddenTeacher, self.teacher)
                states, hidden = teacher.states_and_hidden(texts, fmt.depths)
                # a hidden state fits where a teacher token ends with the student's
                ends = slice(None) if work.prefixes is None else work.prefixes[which] == 0
                places = work.positions[which[ends]] - work.start
                writer = HiddenStateWriter(fmt, arrays[HIDDEN_STATES])
                writer.put(hidden, of_state[ends], places)
            chunk = max(1, LOGITS_AT_ONCE // self.teacher.vocab_size)
            for at in range(0, len(which), chunk):
                part = which[at : at + chunk]
                rows = torch.from_numpy(of_state[at : at + chunk]).to(states.device)
                logits = self.teacher.logits(states[rows])
                size = ROWS_AT_ONCE if logits.device.type == "cpu" else chunk
                for begin in range(0, len(part), size):
                    few = part[begin : begin + size]
                    entries = self._encode(logits[begin : begin + size], work, few, support)
                    arrays[ENTRIES][work.positions[few] - work.start] = entries
        except FloatingPointError as error:
            raise not_finite(self.teacher.name, str(error)) from None

    def _encode(
        self, logits: Tensor, work: Work, part: np.ndarray, support: np.ndarray | None
    ) -> np.ndarray:
        """Entries of the positions `part`; `support` holds the student's tokens for all."""
        probs = torch.softmax(logits, dim=1)
        if self.projection is not None and work.prefixes is not None:
            probs = self.projection(probs, work.prefixes[part])
        if probs.device.type == "mps":  # no float64 there, which the tail samples need
            probs = probs.cpu()
        device = probs.device
        labels = torch.from_numpy(work.labels[part]).to(device)
        positions = torch.from_numpy(work.positions[part]).to(device)
        ids = None
        if support is not None:
            of_student = torch.from_numpy(support[part].astype(np.int64)).to(device)
            ids = top_k_ids(probs, of_student, labels, self.format.top_k)
        return encode(probs, labels, positions, self.format, self.config.seed, ids)


def not_finite(teacher: str, what: str) -> XinslmError:
    """The error of a teacher with NaN or infinite numbers."""
    return XinslmError(
        f"teacher {teacher}: {what}. Try --dtype float32, or check the weights; finished work is "
        "kept"
    )


def covered_by(
    rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Indices into `rows` that fall in the given sequences, and those rows' places in the
    sequences' concatenation.
    """
    offsets = np.cumsum(lengths) - lengths
    spans = np.searchsorted(rows, np.stack((starts, starts + lengths))).T
    which = np.concatenate([np.arange(low, high) for low, high in spans])
    shifts = np.repeat(offsets - starts, spans[:, 1] - spans[:, 0])
    return which, rows[which] + shifts


def _work(split: Split, first: int, last: int, projection: NestedProjection | None) -> Work:
    """Lay out documents `first` to `last` for the teacher."""
    documents = np.asarray(split.documents[first : last + 1], dtype=np.int64)
    start, end = int(documents[0]), int(documents[-1])
    tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
    counts = np.asarray(split.mask[start:end]) != 0
    targets = np.flatnonzero(counts)
    if projection is None:
        return Work(
            tokens,
            documents - start,
            start,
            start + targets - 1,
            tokens[targets],
            targets - 1,
            None,
        )
    rows = np.full(len(tokens), -1, dtype=np.int64)
    prefixes = np.full_like(rows, -1)
    teacher_tokens: list[np.ndarray] = []
    offsets = [0]
    for a, b in zip(documents[:-1] - start, documents[1:] - start, strict=True):
        aligned = projection.align(tokens[a:b])
        rows[a + 1 : b] = aligned.rows + offsets[-1]
        prefixes[a + 1 : b] = aligned.prefixes
        teacher_tokens.append(aligned.teacher_ids)
        offsets.append(offsets[-1] + len(aligned.teacher_ids))
    kept = np.flatnonzero(prefixes[targets] >= 0)
    targets = targets[kept]
    return Work(
        np.concatenate(teacher_tokens),
        np.array(offsets),
        start,
        start + targets - 1,
        tokens[targets],
        rows[targets],
        prefixes[targets],
        kept,
    )
