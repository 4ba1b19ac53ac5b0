"""What the stage `cache` asks for the arrays of a shard, and the answer of a teacher that gives
whole distributions.

An array holds one fixed-size item for each position of the token stream. Every cache has the array
`entries`; others (projected hidden states) stand in files beside it. Sequences are batched by
length, the head is applied to a few hundred rows at a time, and only positions whose next token
counts as a target are scored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from xinslm.alignment.nested import NestedProjection
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import CacheFormat, encode
from xinslm.cache.projected_states import HIDDEN_STATES, HiddenStateFormat, HiddenStateWriter
from xinslm.cache.support import Support, top_k_ids
from xinslm.data.dataset import Split
from xinslm.data.packing import sequences
from xinslm.errors import XinslmError
from xinslm.teachers.base import DenseTeacher, HiddenTeacher
from xinslm.teachers.local import batches_by_length

ENTRIES = "entries"
LOGITS_AT_ONCE = 1 << 23
"""Numbers in one block of logits (32 MiB of float32)."""


class Scorer(Protocol):
    """Scores runs of documents; what it gives depends on nothing but the documents, so that shards
    can be redone.
    """

    arrays: dict[str, np.dtype[Any]]
    """Name of each array -> type of one position's item; `entries` is among them."""

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Planes of documents `first` to `last` (not included), one item a token of theirs.

        `scratch` is a file of the scorer's own that survives an interruption and is deleted when
        the shard is written; `tell` takes the number of tokens done so far in this shard.
        """
        ...


@dataclass(frozen=True)
class Work:
    """A run of documents as the teacher reads them, and which of its rows say what about which
    stream position.
    """

    tokens: np.ndarray
    """Teacher ids, documents one behind the other."""
    documents: np.ndarray
    """Their offsets."""
    positions: np.ndarray
    """Stream positions to score."""
    labels: np.ndarray
    """The tokens that came there, in the dataset's vocabulary."""
    rows: np.ndarray
    """For each position, the row of `tokens` whose prediction covers it; never falls."""
    prefixes: np.ndarray | None
    """For each position, the number of the pieces of a teacher token that have come, 0 at a
    boundary of the teacher; None where the tokenizers are the same."""
    kept: np.ndarray | None = None
    """Which of the documents' targets these positions are, where the teacher has no word on
    others.
    """


class DenseScorer:
    """Sparse entries from a teacher that gives its logits over the whole vocabulary."""

    def __init__(
        self,
        teacher: DenseTeacher,
        projection: NestedProjection | None,
        fmt: CacheFormat,
        config: CacheConfig,
        hidden_state_format: HiddenStateFormat | None = None,
        support: Support | None = None,
    ) -> None:
        """With `hidden_state_format`, the teacher must be a `HiddenTeacher`; `support` says which
        tokens the heads hold.
        """
        self.teacher, self.projection, self.format, self.config = teacher, projection, fmt, config
        self.hidden_state_format, self.support = hidden_state_format, support
        self.arrays = (
            {ENTRIES: fmt.dtype}
            if hidden_state_format is None
            else {ENTRIES: fmt.dtype, HIDDEN_STATES: hidden_state_format.dtype}
        )

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`; positions that are no targets keep flag 0."""
        start, end = int(split.documents[first]), int(split.documents[last])
        work = _work(split, first, last, self.projection)
        writer = (
            None
            if self.hidden_state_format is None
            else HiddenStateWriter(self.hidden_state_format, end - start)
        )
        support = None if self.support is None else self.support.of(split, first, last)
        if support is not None and work.kept is not None:
            support = support[work.kept]
        entries = _score(
            work,
            start,
            end - start,
            self.teacher,
            self.projection,
            self.format,
            self.config,
            tell,
            writer,
            support,
        )
        return (
            {ENTRIES: entries}
            if writer is None
            else {ENTRIES: entries, HIDDEN_STATES: writer.entries}
        )


def _work(split: Split, first: int, last: int, projection: NestedProjection | None) -> Work:
    """Lay out documents `first` to `last` for the teacher."""
    documents = np.asarray(split.documents[first : last + 1], dtype=np.int64)
    start, end = int(documents[0]), int(documents[-1])
    tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
    counts = np.asarray(split.mask[start:end]) != 0
    targets = np.flatnonzero(counts)
    if projection is None:
        return Work(
            tokens, documents - start, start + targets - 1, tokens[targets], targets - 1, None
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
        start + targets - 1,
        tokens[targets],
        rows[targets],
        prefixes[targets],
        kept,
    )


def _score(
    work: Work,
    start: int,
    count: int,
    teacher: DenseTeacher,
    projection: NestedProjection | None,
    fmt: CacheFormat,
    config: CacheConfig,
    tell: Callable[[int], None],
    writer: HiddenStateWriter | None = None,
    support: np.ndarray | None = None,
) -> np.ndarray:
    """Entries of one shard, (count,); positions that are no targets keep flag 0."""
    entries = np.zeros(count, dtype=fmt.dtype)
    starts, lengths = sequences(work.documents, config.max_seq_length)
    chunk = max(1, LOGITS_AT_ONCE // teacher.vocab_size)
    seen = 0
    for batch in batches_by_length(lengths, config.batch_tokens):
        texts = [work.tokens[starts[k] : starts[k] + lengths[k]] for k in batch]
        hidden: list[Tensor] = []
        if writer is None:
            states = teacher.states(texts)
        else:
            states, hidden = cast(HiddenTeacher, teacher).states_and_hidden(
                texts, writer.format.depths
            )
        picked, offset = [], 0
        state_rows = []
        for k in batch:
            low, high = np.searchsorted(work.rows, (starts[k], starts[k] + lengths[k]))
            picked.append(np.arange(low, high))
            state_rows.append(work.rows[low:high] - starts[k] + offset)
            offset += int(lengths[k])
        which, of_state = np.concatenate(picked), np.concatenate(state_rows)
        if writer is not None:
            _project_states(work, which, of_state, start, hidden, writer, teacher.name)
        for at in range(0, len(which), chunk):
            part = which[at : at + chunk]
            logits = teacher.logits(
                states[torch.from_numpy(of_state[at : at + chunk]).to(states.device)]
            )
            probs = torch.softmax(logits, dim=1)
            if projection is not None and work.prefixes is not None:
                probs = projection(probs, work.prefixes[part])
            entries[work.positions[part] - start] = _encode(
                probs,
                work,
                part,
                fmt,
                config.seed,
                teacher.name,
                None if support is None else support[part],
            )
        seen += int(lengths[batch].sum())
        tell(min(seen, count))
    return entries


def predictions(
    teacher: DenseTeacher,
    tokens: np.ndarray,
    documents: np.ndarray,
    config: CacheConfig,
    tell: Callable[[int], None],
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Logits (rows, vocabulary) of the teacher's own tokens, and the places (rows,) of the tokens
    they predict.

    documents: offsets into `tokens`. A document's first token is predicted by nothing.
    """
    starts, lengths = sequences(documents, config.max_seq_length)
    chunk = max(1, LOGITS_AT_ONCE // teacher.vocab_size)
    seen = 0
    for batch in batches_by_length(lengths, config.batch_tokens):
        inputs = np.concatenate([np.arange(starts[k], starts[k] + lengths[k]) for k in batch])
        states = teacher.states([tokens[starts[k] : starts[k] + lengths[k]] for k in batch])
        for at in range(0, len(states), chunk):
            yield inputs[at : at + chunk] + 1, teacher.logits(states[at : at + chunk])
        seen += len(inputs)
        tell(seen)


def _project_states(
    work: Work,
    which: np.ndarray,
    of_state: np.ndarray,
    start: int,
    hidden: list[Tensor],
    writer: HiddenStateWriter,
    name: str,
) -> None:
    """Project the hidden states of positions at whose end a teacher token ends, too."""
    ends = np.ones(len(which), dtype=bool) if work.prefixes is None else work.prefixes[which] == 0
    try:
        writer.put(hidden, of_state[ends], work.positions[which[ends]] - start)
    except FloatingPointError as error:
        raise XinslmError(
            f"teacher {name}: {error}. Try --dtype float32, or look at the weights; finished "
            "shards are kept"
        ) from None


def _encode(
    probs: Tensor,
    work: Work,
    part: np.ndarray,
    fmt: CacheFormat,
    seed: int,
    name: str,
    support: np.ndarray | None = None,
) -> np.ndarray:
    if probs.device.type == "mps":  # no float64 there, which the tail samples need
        probs = probs.cpu()
    device = probs.device
    labels = torch.from_numpy(work.labels[part]).to(device)
    positions = torch.from_numpy(work.positions[part]).to(device)
    try:
        chosen_ids = None
        if support is not None:
            chosen_ids = top_k_ids(
                probs, torch.from_numpy(support.astype(np.int64)).to(device), labels, fmt.top_k
            )
        return encode(probs, labels, positions, fmt, seed, chosen_ids)
    except FloatingPointError as error:
        raise XinslmError(
            f"teacher {name}: {error}. Try --dtype float32, or look at the weights; finished "
            "shards are kept"
        ) from None
