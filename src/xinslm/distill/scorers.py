"""What the stage `cache` asks for the planes of a shard, and the answer of a teacher that gives whole distributions.

A plane holds one fixed-size item for each position of the token stream. Every cache has the plane `records`; others
(sketches of hidden states) stand in files beside it. Sequences are batched by length, the head is applied to a few
hundred rows at a time, and only positions whose next token counts as a target are scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xinslm.data.dataset import Dataset, Split
from xinslm.data.packing import sequences
from xinslm.distill.cache import CacheFormat, encode
from xinslm.distill.cache_config import CacheConfig
from xinslm.distill.nested import PushForward, is_nested
from xinslm.errors import UsageError, XinslmError
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.huggingface import batches_by_length

RECORDS = "records"
LOGITS_AT_ONCE = 1 << 22
"""Numbers in one block of logits (16 MiB of float32)."""


class Scorer(Protocol):
    """Scores runs of documents; what it gives depends on nothing but the documents, so that shards can be redone."""

    planes: dict[str, np.dtype[Any]]
    """Name of each plane -> type of one position's item; `records` is among them."""

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Planes of documents `first` to `last` (not included), one item a token of theirs.

        `scratch` is a file of the scorer's own that survives an interruption and is deleted when the shard is
        written; `tell` takes the number of tokens done so far in this shard.
        """
        ...


@dataclass(frozen=True)
class Work:
    """A run of documents as the teacher reads them, and which of its rows say what about which stream position."""

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
    prefixes: list[tuple[int, ...]] | None
    """For each position, the pieces of a teacher token that have come; None where the tokenizers are the same."""


def relate(dataset: Dataset, teacher: DenseTeacher) -> PushForward | None:
    """None where teacher and dataset share their tokenizer, a push-forward where the dataset's is nested."""
    from xinslm.tokenizer.load import load_tokenizer

    if teacher.tokenizer.fingerprint() == dataset.tokenizer_fingerprint:
        return None
    own = load_tokenizer(dataset.folder / "tokenizer")
    if is_nested(own, teacher.tokenizer):
        return PushForward(own, teacher.tokenizer)
    raise UsageError(
        f"dataset {dataset.folder} and teacher {teacher.name} have different tokenizers ({own.vocab_size:,} and "
        f"{teacher.vocab_size:,} ids), and the dataset's is not a merge prefix of the teacher's. Prepare the dataset "
        f"with the teacher's own tokenizer (`xinslm prepare --tokenizer-path {teacher.name}`), or with a nested one "
        f"(`xinslm tokenizer train --prefix-of {teacher.name}`)"
    )


class DenseScorer:
    """Sparse records from a teacher that gives its logits over the whole vocabulary."""

    def __init__(self, teacher: DenseTeacher, push: PushForward | None, fmt: CacheFormat, config: CacheConfig) -> None:
        self.teacher, self.push, self.format, self.config = teacher, push, fmt, config
        self.planes = {RECORDS: fmt.dtype}

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`; positions that are no targets keep flag 0."""
        start, end = int(split.documents[first]), int(split.documents[last])
        work = _work(split, first, last, self.push)
        records = _score(work, start, end - start, self.teacher, self.push, self.format, self.config, tell)
        return {RECORDS: records}


def _work(split: Split, first: int, last: int, push: PushForward | None) -> Work:
    """Lay out documents `first` to `last` for the teacher."""
    documents = np.asarray(split.documents[first : last + 1], dtype=np.int64)
    start, end = int(documents[0]), int(documents[-1])
    tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
    counts = np.asarray(split.mask[start:end]) != 0
    targets = np.flatnonzero(counts)
    if push is None:
        return Work(tokens, documents - start, start + targets - 1, tokens[targets], targets - 1, None)
    rows = np.full(len(tokens), -1, dtype=np.int64)
    prefixes: list[tuple[int, ...]] = [()] * len(tokens)
    teacher_tokens: list[np.ndarray] = []
    offsets = [0]
    for a, b in zip(documents[:-1] - start, documents[1:] - start, strict=True):
        aligned = push.align(tokens[a:b])
        rows[a + 1 : b] = aligned.rows + offsets[-1]
        prefixes[a + 1 : b] = aligned.prefixes
        teacher_tokens.append(aligned.teacher_ids)
        offsets.append(offsets[-1] + len(aligned.teacher_ids))
    return Work(
        np.concatenate(teacher_tokens), np.array(offsets), start + targets - 1, tokens[targets], rows[targets],
        [prefixes[t] for t in targets],
    )  # fmt: skip


def _score(
    work: Work, start: int, count: int, teacher: DenseTeacher, push: PushForward | None, fmt: CacheFormat,
    config: CacheConfig, tell: Callable[[int], None],
) -> np.ndarray:  # fmt: skip
    """Records of one shard, (count,); positions that are no targets keep flag 0."""
    records = np.zeros(count, dtype=fmt.dtype)
    starts, lengths = sequences(work.documents, config.max_seq_length)
    chunk = max(1, LOGITS_AT_ONCE // teacher.vocab_size)
    seen = 0
    for batch in batches_by_length(lengths, config.batch_tokens):
        states = teacher.states([work.tokens[starts[k] : starts[k] + lengths[k]] for k in batch])
        picked, offset = [], 0
        state_rows = []
        for k in batch:
            low, high = np.searchsorted(work.rows, (starts[k], starts[k] + lengths[k]))
            picked.append(np.arange(low, high))
            state_rows.append(work.rows[low:high] - starts[k] + offset)
            offset += int(lengths[k])
        which, of_state = np.concatenate(picked), np.concatenate(state_rows)
        for at in range(0, len(which), chunk):
            part = which[at : at + chunk]
            logits = teacher.logits(states[torch.from_numpy(of_state[at : at + chunk]).to(states.device)])
            probs = torch.softmax(logits, dim=1)
            if push is not None and work.prefixes is not None:
                probs = push(probs, [work.prefixes[i] for i in part])
            records[work.positions[part] - start] = _encode(probs, work, part, fmt, config.seed, teacher.name)
        seen += int(lengths[batch].sum())
        tell(min(seen, count))
    return records


def _encode(probs: Tensor, work: Work, part: np.ndarray, fmt: CacheFormat, seed: int, name: str) -> np.ndarray:
    if probs.device.type == "mps":  # no float64 there, which the draws need
        probs = probs.cpu()
    device = probs.device
    labels = torch.from_numpy(work.labels[part]).to(device)
    positions = torch.from_numpy(work.positions[part]).to(device)
    try:
        return encode(probs, labels, positions, fmt, seed)
    except FloatingPointError as error:
        raise XinslmError(
            f"teacher {name}: {error}. Try --dtype float32, or look at the weights; finished shards are kept"
        ) from None
