"""One text in two tokenizers: the byte where each token begins, and the bytes where both begin one.

A document's student tokens determine its bytes; the teacher reads the same text. Control tokens
that both have (by content, else by role: BOS, EOS, pad) map to each other and count as one byte;
one that the teacher lacks is text to it. The teacher's own BOS is put in front whether the student
has one or not. Tokens need not spell the text: a space put in front (sentencepiece) begins nowhere,
bytes of one character share it, and what a normaliser rewrote or an unknown-token swallowed keeps
the span that the `tokenizers` library reports. Spans of a tokenizer partition the text.
"""

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from xinslm.errors import XinslmError
from xinslm.files import read_json


class ByteReader:
    """One tokenizer, read by bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bytes: list[bytes] = list(map(tokenizer.token_bytes, range(tokenizer.vocab_size)))
        self.lengths = np.array([len(b) for b in self.bytes], dtype=np.int64)

    @cached_property
    def definition(self) -> dict[str, Any]:
        """Its tokenizer.json."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(Path(folder))
            return dict(read_json(Path(folder) / "tokenizer.json"))

    @cached_property
    def _backend(self) -> Backend:
        return _literal(self.definition)

    @cached_property
    def _inner(self) -> Backend:
        return _literal(_without_beginning(self.definition))

    def encode_inner(self, texts: list[str]) -> list[list[int]]:
        """Encode texts as if each were in the middle of one: nothing is put in front of them."""
        return [e.ids for e in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def read(self, text: str) -> tuple[np.ndarray, np.ndarray, bool]:
        """Ids, the byte of `text` where each token ends (never falling, the last at its end), both
        int64; and whether the first token holds a space that the text does not.
        """
        data = text.encode()
        ids = np.array(self.tokenizer.encode(text), dtype=np.int64)
        spelled = b"".join([self.bytes[i] for i in ids.tolist()])
        if spelled == data:
            return ids, np.cumsum(self.lengths[ids]), False
        if spelled == b" " + data:
            return ids, np.cumsum(self.lengths[ids]) - 1, len(ids) > 0
        found = self._backend.encode(text, add_special_tokens=False)
        if found.ids != ids.tolist():
            raise XinslmError(
                f"the tokenizer's two readers disagree on {text[:40]!r}; its tokens cannot be "
                "placed in the text"
            )
        place = np.concatenate(([0], np.cumsum([len(c.encode()) for c in text]))).astype(np.int64)
        spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        ends = place[spans[:, 1]]
        # a character's bytes, each a token; a space in front claims the first as well
        for first, last in _shared(spans):
            sizes, begin = self.lengths[ids[first : last + 1]].copy(), place[spans[last, 0]]
            sizes[0] -= self.bytes[ids[first]] == b" " and sizes.sum() == ends[last] - begin + 1
            if sizes.sum() == ends[last] - begin:
                ends[first : last + 1] = begin + np.cumsum(sizes)
        ends = np.minimum.accumulate(ends[::-1])[::-1]
        if len(ids) and self.bytes[ids[0]] == b" ":
            ends[0] = place[spans[0, 0]]
        ends[-1:] = len(data)
        spaced = (
            len(ids) > 0 and self.bytes[ids[0]][:1] == b" " and ends[0] == self.lengths[ids[0]] - 1
        )
        return ids, ends, bool(spaced)


def _literal(definition: dict[str, Any]) -> Backend:
    """A tokenizer that reads control tokens as text."""
    made = Backend.from_str(json.dumps(definition))
    made.encode_special_tokens = True
    return made


def _shared(spans: np.ndarray) -> list[tuple[int, int]]:
    """Runs (first, last) of tokens that report the same characters."""
    same = np.flatnonzero((spans[1:] == spans[:-1]).all(axis=1))
    runs: list[tuple[int, int]] = []
    for at in same.tolist():
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def _without_beginning(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition without what it does to the first character of a text."""
    changed = json.loads(json.dumps(definition))
    normalizer = changed.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kept = [step for step in steps if step["type"] not in ("Prepend", "Strip")]
    kept = [step for step in kept if "\\A" not in str(step.get("pattern"))]  # start of the text
    changed["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    pre_tokenizer = changed.get("pre_tokenizer") or {}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer] if pre_tokenizer else []):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif "add_prefix_space" in step:
            step["add_prefix_space"] = False
    return changed


@dataclass(frozen=True)
class Pair:
    """A document as both tokenizers cut it."""

    teacher_ids: np.ndarray
    """The teacher's tokens, its BOS in front."""
    student_starts: np.ndarray
    """Byte where each student token begins, and the end: int64 (tokens + 1,), never falling."""
    teacher_starts: np.ndarray
    """The same for the teacher's tokens; what is put in front has no bytes."""
    student_spaced: np.ndarray
    """Whether a student token holds a first space that the text lacks, bool (tokens,)."""
    teacher_spaced: np.ndarray
    """The same for the teacher's."""
    foreign: np.ndarray
    """Whether a student token is a control token that the teacher reads as text, bool (tokens,)."""


class SpanAligner:
    """Cuts documents of a student's tokens as a teacher does."""

    def __init__(self, student: Any, teacher: Any, document_end: str = "eos") -> None:
        """`document_end` is the dataset's; it matters if the student's BOS and EOS are one."""
        self.student, self.teacher = ByteReader(student), ByteReader(teacher)
        self.first: int | None = teacher.start_ids[0] if teacher.start_ids else None
        self.specials = map_specials(student, teacher, document_end)
        self.control = set(student.special_tokens.values())
        self._control = np.array(sorted(self.control), dtype=np.int64)

    def align(self, ids: np.ndarray) -> Pair:
        """Cut one document."""
        ids = ids.astype(np.int64)
        opened = len(ids) > 0 and int(ids[0]) in self.control
        teacher_ids = [np.array([self.first] if self.first is not None else [], dtype=np.int64)]
        teacher_sizes = [np.array([int(opened)][: len(teacher_ids[0])], dtype=np.int64)]
        student_sizes, spaced = [np.array([1][: int(opened)], dtype=np.int64)], []
        foreign = np.zeros(len(ids), dtype=bool)
        student_spaced = np.zeros(len(ids), dtype=bool)
        places = np.flatnonzero(np.isin(ids, self._control))
        places = places[int(opened) :]
        has_other = np.isin(ids[places], list(self.specials))
        mapped = places[has_other].tolist()
        foreign[places[~has_other]] = True
        cuts = sorted({int(opened), *mapped, *(p + 1 for p in mapped), len(ids)})
        for begin, end in pairwise(cuts):
            if begin in mapped:
                student_sizes.append(np.ones(1, np.int64))
                teacher_sizes.append(np.ones(1, np.int64))
                teacher_ids.append(np.array([self.specials[int(ids[begin])]]))
                continue
            sizes, text, has_space = self._text(ids[begin:end], foreign[begin:end])
            student_spaced[begin] = has_space
            student_sizes.append(sizes)
            found, ends, teacher_space = self.teacher.read(text)
            if teacher_space:
                spaced.append(sum(map(len, teacher_ids)))
            teacher_ids.append(found)
            teacher_sizes.append(np.diff(ends, prepend=0))
        joined = np.concatenate(teacher_ids)
        teacher_spaced = np.zeros(len(joined), dtype=bool)
        teacher_spaced[spaced] = True
        return Pair(
            joined,
            _starts(student_sizes, 0),
            _starts(teacher_sizes, int(opened and self.first is None)),
            student_spaced,
            teacher_spaced,
            foreign,
        )

    def _text(self, ids: np.ndarray, foreign: np.ndarray) -> tuple[np.ndarray, str, bool]:
        """Sizes of a run's tokens, its text, and whether the first token drops a space."""
        sizes = self.student.lengths[ids].copy()
        data = b"".join([self.student.bytes[i] for i in ids.tolist()])
        strips = self.student.tokenizer.strips_first_space
        has_space = strips and data[:1] == b" " and not foreign[0]
        if has_space:
            sizes[0] -= 1
            data = data[1:]
        try:
            return sizes, data.decode(), has_space
        except UnicodeDecodeError:
            raise XinslmError(
                "a document's tokens are not UTF-8 text, so that the teacher cannot read them; "
                f"it holds {data[:60]!r}"
            ) from None


def _starts(sizes: list[np.ndarray], begin: int) -> np.ndarray:
    return np.cumsum(np.concatenate([np.array([begin], dtype=np.int64), *sizes]))


def map_specials(student: Any, teacher: Any, document_end: str = "bos") -> dict[int, int]:
    """Student's special ids -> the teacher's, by content, else by role.

    `document_end` is the role of a token that is both BOS and EOS.
    """
    table = {
        i: teacher.special_tokens[name]
        for name, i in student.special_tokens.items()
        if name in teacher.special_tokens
    }
    ends = ("bos_id", "eos_id") if document_end == "bos" else ("eos_id", "bos_id")
    for role in (*ends, "pad_id"):
        ours, theirs = getattr(student, role), getattr(teacher, role)
        if ours is not None and theirs is not None:
            table.setdefault(ours, theirs)
    return table
