"""A cache from a teacher that has hidden states only: projected hidden states where its tokens end
as the student's do, no entries.

A document's text stands between its control tokens; each such run is read by the encoder's own
tokenizer, and the tokens of all runs make one sequence. A position of the student has a projected
hidden state where its token and one of the encoder's end at the same byte. Texts are cut at the
encoder's context.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import CacheFormat
from xinslm.cache.projected_states import HIDDEN_STATES, HiddenStateFormat, HiddenStateWriter
from xinslm.cache.scorers import ENTRIES
from xinslm.data.dataset import Split
from xinslm.errors import XinslmError
from xinslm.teachers.encoder import EncoderTeacher, Reading
from xinslm.teachers.local import batches_by_length


def empty_format(vocab_size: int) -> CacheFormat:
    """The smallest entries, 10 bytes; all of them will say that the teacher knows nothing of the
    position.
    """
    return CacheFormat(vocab_size, top_k=1, tail_samples=0, temperature=1.0)


class EncoderScorer:
    """Projected hidden states of an encoder's for documents in any other tokenizer."""

    def __init__(
        self,
        teacher: EncoderTeacher,
        student: Any,
        fmt: CacheFormat,
        hidden_state_format: HiddenStateFormat,
        config: CacheConfig,
    ) -> None:
        self.teacher, self.format, self.config = teacher, hidden_state_format, config
        self.arrays = {ENTRIES: fmt.dtype, HIDDEN_STATES: hidden_state_format.dtype}
        self.bytes = [student.token_bytes(token) for token in range(student.vocab_size)]
        self.sizes = np.array([len(data) for data in self.bytes], dtype=np.int64)
        self.is_control = np.zeros(student.vocab_size, dtype=bool)
        self.is_control[list(student.special_tokens.values())] = True

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Project documents `first` to `last`; all entries keep flag 0."""
        start, end = int(split.documents[first]), int(split.documents[last])
        tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
        is_target = np.asarray(split.mask[start:end]) != 0
        theirs, offsets, rows = self._align(
            tokens, np.asarray(split.documents[first : last + 1]) - start
        )
        # ends of documents predict nothing
        wanted = np.flatnonzero((rows[:-1] >= 0) & is_target[1:])
        places, rows = wanted, rows[wanted]
        writer = HiddenStateWriter(self.format, end - start)
        # its end token has the last place
        length = min(self.config.max_seq_length, self.teacher.max_length) - 1
        cuts = [
            (at, min(at + length, b)) for a, b in pairwise(offsets) for at in range(a, b, length)
        ]
        starts, stops = np.array(cuts, dtype=np.int64).reshape(-1, 2).T
        lengths = stops - starts
        seen = 0
        for batch in batches_by_length(lengths, self.config.batch_tokens):
            hidden = self.teacher.hidden(
                [theirs[starts[k] : starts[k] + lengths[k]] for k in batch], self.format.depths
            )
            before = np.cumsum(lengths[batch]) - lengths[batch]
            spans = [np.searchsorted(rows, (starts[k], starts[k] + lengths[k])) for k in batch]
            which = np.concatenate([np.arange(low, high) for low, high in spans])
            of_state = [
                rows[low:high] - starts[k] + at
                for (low, high), k, at in zip(spans, batch, before, strict=True)
            ]
            try:
                writer.put(hidden, np.concatenate(of_state), places[which])
            except FloatingPointError as error:
                raise XinslmError(
                    f"encoder {self.teacher.name}: {error}. Try --dtype float32 (T5 overflows in "
                    "float16), or look at "
                    f"the weights; finished shards are kept"
                ) from None
            seen += int(lengths[batch].sum())
            tell(min(seen, end - start))
        return {
            ENTRIES: np.zeros(end - start, dtype=self.arrays[ENTRIES]),
            HIDDEN_STATES: writer.entries,
        }

    def _align(
        self, tokens: np.ndarray, documents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encoder's tokens, their offsets by document, and for each student token the encoder's
        that ends there or -1.

        Rows count the encoder's tokens of all documents.
        """
        controls = np.flatnonzero(self.is_control[tokens])
        bounds = np.unique(np.concatenate([documents, controls, controls + 1]))
        runs = [(a, b) for a, b in pairwise(bounds) if not self.is_control[tokens[a]]]
        texts, read = [], []
        for a, b in runs:
            try:
                texts.append(b"".join([self.bytes[token] for token in tokens[a:b]]).decode())
                read.append((a, b))
            except UnicodeDecodeError:  # bytes that are no text have no counterpart
                continue
        rows = np.full(len(tokens), -1, dtype=np.int64)
        counts = np.zeros(len(documents) - 1, dtype=np.int64)
        parts, at = [np.zeros(0, dtype=np.int64)], 0
        for (a, b), reading in zip(
            read, self.teacher.tokenizer.read(texts) if texts else [], strict=True
        ):
            found = match_ends(np.cumsum(self.sizes[tokens[a:b]]), reading)
            rows[a:b] = np.where(found >= 0, found + at, -1)
            parts.append(reading.ids)
            at += len(reading.ids)
            counts[np.searchsorted(documents, a, side="right") - 1] += len(reading.ids)
        return np.concatenate(parts), np.concatenate([[0], np.cumsum(counts)]), rows


def match_ends(ends: np.ndarray, reading: Reading) -> np.ndarray:
    """For tokens that end behind the bytes `ends` of a text: the token of `reading` that ends
    there, or -1.

    Where several end there, pieces of one character, it is the last. One that the next overlaps
    does not end there.
    """
    at = np.searchsorted(reading.ends, ends, side="right") - 1
    if not len(reading.ids):
        return np.full(len(ends), -1, dtype=np.int64)
    following = np.append(reading.begins[1:], np.iinfo(np.int64).max)
    fits = (at >= 0) & (reading.ends[at] == ends) & (following[at] >= ends)
    return np.where(fits, at, -1)
