"""Projected hidden states of a teacher that predicts no tokens: an encoder.

The text between control tokens is encoded with the encoder's tokenizer; the tokens of a document
form one sequence, cut at the encoder's context. A student position has a projected hidden state if
its token and one of the encoder's end at the same byte.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import ENTRIES, CacheFormat
from xinslm.cache.folder import HIDDEN_STATES
from xinslm.cache.journal import ShardJournal
from xinslm.cache.projected_states import HiddenStateFormat, HiddenStateWriter
from xinslm.cache.scorers import covered_by
from xinslm.data.dataset import Split
from xinslm.errors import XinslmError
from xinslm.teachers.encoder import EncoderTeacher, Reading
from xinslm.teachers.local import batches_by_length


def empty_format(vocab_size: int) -> CacheFormat:
    """The smallest entries, 11 bytes; all positions are uncovered."""
    return CacheFormat(vocab_size, top_k=1, tail_sample_mass=0.0, temperature=1.0)


class EncoderScorer:
    """Projected hidden states of an encoder, for documents in any other tokenizer."""

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
        self, split: Split, first: int, last: int, scratch: Path, report: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Project documents `first` to `last`; all entries keep flag 0."""
        start, end = int(split.documents[first]), int(split.documents[last])
        tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
        is_target = np.asarray(split.mask[start:end]) != 0
        documents = np.asarray(split.documents[first : last + 1]) - start
        theirs, offsets, rows = self._align(tokens, documents)
        # the last token of a document predicts nothing
        wanted = np.flatnonzero((rows[:-1] >= 0) & is_target[1:])
        rows = rows[wanted]
        arrays = {name: np.zeros(end - start, item) for name, item in self.arrays.items()}
        states = {HIDDEN_STATES: arrays[HIDDEN_STATES]}
        # one place of the context is for the encoder's end token
        length = min(self.config.max_seq_length, self.teacher.max_length) - 1
        cuts = [
            (at, min(at + length, b)) for a, b in pairwise(offsets) for at in range(a, b, length)
        ]
        starts, stops = np.array(cuts, dtype=np.int64).reshape(-1, 2).T
        lengths = stops - starts
        seen = 0
        with ShardJournal(scratch) as journal:
            for step, batch in enumerate(batches_by_length(lengths, self.config.batch_tokens)):
                which, of_state = covered_by(rows, starts[batch], lengths[batch])
                if not journal.restore(step, wanted[which], states):
                    texts = [theirs[starts[k] : stops[k]] for k in batch]
                    self._project(texts, of_state, wanted[which], states[HIDDEN_STATES])
                    journal.keep(step, wanted[which], states)
                seen += int(lengths[batch].sum())
                report(min(seen, end - start))
        return arrays

    def _project(
        self, texts: list[np.ndarray], of_state: np.ndarray, places: np.ndarray, out: np.ndarray
    ) -> None:
        hidden = self.teacher.hidden(texts, self.format.depths)
        try:
            HiddenStateWriter(self.format, out).put(hidden, of_state, places)
        except FloatingPointError as error:
            raise XinslmError(
                f"encoder {self.teacher.name}: {error}. Try --dtype float32 (T5 overflows in "
                "float16), or check the weights; finished work is kept"
            ) from None

    def _align(
        self, tokens: np.ndarray, documents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The encoder's tokens, their offsets by document, its token per student token (or -1)."""
        controls = np.flatnonzero(self.is_control[tokens])
        bounds = np.unique(np.concatenate([documents, controls, controls + 1]))
        runs = [(a, b) for a, b in pairwise(bounds) if not self.is_control[tokens[a]]]
        texts, read = [], []
        for a, b in runs:
            try:
                texts.append(b"".join([self.bytes[token] for token in tokens[a:b]]).decode())
                read.append((a, b))
            except UnicodeDecodeError:  # invalid UTF-8 has no counterpart
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
    """For each of the bytes `ends` of a text, the token of `reading` that ends there, or -1.

    If several end there (pieces of one character), the last is taken. A token that the next one
    overlaps does not count.
    """
    at = np.searchsorted(reading.ends, ends, side="right") - 1
    if not len(reading.ids):
        return np.full(len(ends), -1, dtype=np.int64)
    following = np.append(reading.begins[1:], np.iinfo(np.int64).max)
    fits = (at >= 0) & (reading.ends[at] == ends) & (following[at] >= ends)
    return np.where(fits, at, -1)
