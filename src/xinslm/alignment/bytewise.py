"""Teacher distributions for a student of any other tokenizer: first-token push-forward at shared
byte boundaries.

Where both tokenizers begin a token at one byte, the teacher's next token says what the student's
next one is, if the student cuts every text that may follow alike: "needle" begins with the
student's "need" or not, whatever comes. That is decided by encoding each teacher token with a set
of continuations, among which those count that the teacher itself would cut there (no teacher that
knows " there" goes on from " the" with "re"), and each student token with the teacher's tokenizer.
A teacher token after which the student may have several tokens is *open*: which of them, nobody
knows, so its mass and all mass of those tokens is left out, to be one bucket with the rest. What
remains is exact: the student is taught the probability of a token only where that is known whole.
Inside a teacher token that began at a shared boundary the same holds for the longer teacher tokens
that begin with the student's pieces so far.

In the bucket the text stands in for the teacher. A student token that the text has, if it is not
taught so but ends at a boundary of the teacher, has its probability told beside (`log_label`): the
product of the teacher's along it, times the share of what may follow that leaves the token as it
is.
"""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.alignment.projection import Pieces, Prefixes, Tables
from xinslm.alignment.spans import Pair, SpanAligner

CONTINUATIONS = ("", " ", "\n", ".", "1", "'", "A", *"esainrt")
"""What may follow a token, as far as tokenizers tell texts apart: nothing, space, line end, signs,
digit, letters.
"""


@dataclass(frozen=True)
class ByteAlignment:
    """One document, as `nested.Alignment` has it; rows of positions without a prefix mean
    nothing.
    """

    teacher_ids: np.ndarray
    rows: np.ndarray
    prefixes: np.ndarray
    path_ends: np.ndarray
    """For each student token but the first: index behind the teacher tokens, from `rows + 1` on,
    that spell just it; -1 where none do. int64."""


class BytePush:
    """Maps teacher distributions (N, teacher vocabulary) to student ones (N, student vocabulary),
    as far as known.
    """

    kind = "bytes"

    def __init__(self, student: Any, teacher: Any, document_end: str = "eos") -> None:
        self.student, self.teacher = student, teacher
        self.spans = SpanAligner(student, teacher, document_end)
        found = _Pieces(self.spans)
        self.pieces = found.known
        self.prefixes = Prefixes([(*pieces, -1) for pieces in self.pieces])
        numbers, lost = self.prefixes.numbers, student.vocab_size
        unsure: dict[Pieces, set[int]] = defaultdict(set)
        for token, candidates in found.open.items():
            unsure[self.pieces[token]] |= candidates
        columns = np.array([p[0] if p and p[0] not in unsure[()] else lost for p in self.pieces])
        entries = []
        for token, pieces in enumerate(self.pieces):
            for size in range(1, len(pieces) + (token in found.open)):
                following, before = pieces[size] if size < len(pieces) else lost, pieces[:size]
                entries.append(
                    (numbers[before], token, lost if following in unsure[before] else following)
                )
        self.tables = Tables(lost, columns, entries)
        self.exact = np.zeros(lost, dtype=bool)
        """Student tokens whose probability at a shared boundary is known whole."""
        self.exact[columns[columns < lost]] = True

    def __call__(self, probs: Tensor, prefixes: np.ndarray) -> Tensor:
        """Push teacher probabilities forward, each after the pieces number `prefixes[n]`."""
        return self.tables(probs, prefixes)

    def align(self, ids: np.ndarray) -> ByteAlignment:
        """Read a document with the teacher's tokenizer and find what its rows say."""
        ids = ids.astype(np.int64)
        pair = self.spans.align(ids)
        begins = pair.student_starts[1:-1]
        at = np.searchsorted(pair.teacher_starts[:-1], begins, side="right") - 1
        known = at >= 1
        safe = at.clip(min=0)
        from_start = pair.teacher_starts[safe]
        # the student token that begins there, if any
        first = np.searchsorted(pair.student_starts[:-1], from_start)
        first = np.minimum(first, np.arange(1, len(ids)))
        same = pair.student_starts[first] == from_start
        spaced = pair.teacher_spaced[safe] == pair.student_spaced[first]
        known &= same & spaced & ~pair.foreign[1:]
        prefixes = np.where(known, 0, -1)
        depth = np.arange(1, len(ids)) - first
        for step in range(int(depth[known].max(initial=0))):
            going = np.flatnonzero(known & (depth > step))
            prefixes[going] = self.prefixes.after(prefixes[going], ids[first[going] + step])
        has_table = prefixes < len(self.tables.starts) - 1
        prefixes = np.where(has_table, prefixes, -1)
        return ByteAlignment(
            pair.teacher_ids, at - 1, prefixes, _path_ends(pair, at, prefixes == 0)
        )

    @cached_property
    def _extensions(self) -> tuple[list[bytes], list[int], dict[bytes, int], list[bytes]]:
        """Teacher's tokens sorted by bytes, their ids, ids by bytes, and the student's tokens
        sorted by bytes.
        """
        ordinary = [
            (b, i)
            for i, b in enumerate(self.spans.teacher.bytes)
            if b and i not in self.teacher.special_tokens.values()
        ]
        ordinary.sort()
        student = sorted(
            b for i, b in enumerate(self.spans.student.bytes) if b and i not in self.spans.control
        )
        return (
            [b for b, _ in ordinary],
            [i for _, i in ordinary],
            {b: i for b, i in ordinary},
            student,
        )

    def leaves(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Teacher tokens that make another of the student's `token` when they follow it, and those
        that may.
        """
        if token not in self._leaving:
            spelled, ids, by_bytes, student = self._extensions
            own = self.spans.student.bytes[token]
            sure: set[int] = set()
            perhaps: set[int] = set()
            for at in range(bisect_left(student, own), len(student)):
                if not student[at].startswith(own):
                    break
                rest = student[at][len(own) :]
                for size in range(1, len(rest)):
                    if rest[:size] in by_bytes:
                        perhaps.add(by_bytes[rest[:size]])
                if rest:
                    low = bisect_left(spelled, rest)
                    while low < len(spelled) and spelled[low].startswith(rest):
                        sure.add(ids[low])
                        low += 1
            self._leaving[token] = np.array(sorted(sure)), np.array(sorted(perhaps - sure))
        return self._leaving[token]

    @cached_property
    def _leaving(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def stay(self, probs: Tensor, tokens: np.ndarray) -> Tensor:
        """Probability that student token n stays as it is when teacher row n (N, teacher
        vocabulary) follows it.

        NaN where the teacher's next token leaves that open by more than a tenth; (N,) float32.
        """
        out = probs.new_ones(len(tokens))
        for token in np.unique(tokens):
            rows = torch.from_numpy(np.flatnonzero(tokens == token)).to(probs.device)
            sure, perhaps = (
                torch.from_numpy(ids.astype(np.int64)).to(probs.device)
                for ids in self.leaves(int(token))
            )
            taken = probs[rows]
            least = 1 - taken[:, sure].sum(1) - taken[:, perhaps].sum(1)
            middle = least + taken[:, perhaps].sum(1) / 2
            out[rows] = torch.where(taken[:, perhaps].sum(1) <= 0.1 * middle, middle, torch.nan)
        return out


def _path_ends(pair: Pair, at: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Index behind the teacher tokens, from `at` on, that end where a student token ends; -1 where
    none do.
    """
    ends = pair.student_starts[2:]
    after = np.searchsorted(pair.teacher_starts, ends)
    whole = pair.teacher_starts[after.clip(max=len(pair.teacher_starts) - 1)] == ends
    return np.where(usable & whole & (after > at), after, -1)


class _Pieces:
    """For each teacher token, the student's pieces as far as they are the same whatever follows."""

    def __init__(self, spans: SpanAligner) -> None:
        self.student, self.teacher = spans.student, spans.teacher
        count = spans.teacher.tokenizer.vocab_size
        self.known: list[Pieces] = [()] * count
        self.open: dict[int, set[int]] = {}
        """Teacher tokens that leave the piece behind their known ones open, and the pieces it may
        be.
        """
        control = set(spans.teacher.tokenizer.special_tokens.values())
        writing = {theirs: ours for ours, theirs in reversed(spans.specials.items())}
        # both end a document, where the student has one token for it
        for role in ("bos_id", "eos_id"):
            theirs, ours = (
                getattr(spans.teacher.tokenizer, role),
                getattr(spans.student.tokenizer, role),
            )
            if theirs is not None and ours is not None:
                writing.setdefault(theirs, ours)
        ordinary: list[int] = []
        broken: list[int] = []
        for token, spelled in enumerate(self.teacher.bytes):
            if token in writing:
                self.known[token] = (writing[token],)
            elif token not in control and spelled:
                (ordinary if _is_text(spelled) else broken).append(token)
        self._try_continuations(ordinary)
        self._try_student_tokens(spans.control, control)
        for token in broken:
            self._open_all(token, self.teacher.bytes[token], spans.control)

    def _try_continuations(self, tokens: list[int]) -> None:
        """Encode each token with what may follow, by both tokenizers."""
        texts = [self.teacher.bytes[token].decode() for token in tokens]
        ways = [self._cuts(tokens, [text + ending for text in texts]) for ending in CONTINUATIONS]
        seen: dict[int, set[Pieces]] = {}
        doubtful = []
        for place, (token, *found) in enumerate(zip(tokens, *ways, strict=True)):
            seen[token] = set(found)
            if len(seen[token]) > 1:
                doubtful.append(place)
                seen[token] = set()
        for ending, cuts in zip(CONTINUATIONS, ways, strict=True):
            checks = self.teacher.encode_inner([texts[place] + ending for place in doubtful])
            for place, check in zip(doubtful, checks, strict=True):
                if check[:1] == [tokens[place]]:
                    seen[tokens[place]].add(cuts[place])
        for token, different in seen.items():
            longest = max(different, key=len, default=())
            same = 0
            while same < len(longest) and len({way[same : same + 1] for way in different}) == 1:
                same += 1
            self.known[token] = longest[:same]
            if len(different) > 1:
                self.open[token] = {way[same] for way in different if len(way) > same}

    def _cuts(self, tokens: list[int], followed: list[str]) -> list[Pieces]:
        """The student's pieces of texts, as far as they begin within the teacher tokens that begin
        those.
        """
        sizes, out = self.student.lengths.tolist(), []
        for token, cut in zip(tokens, self.student.encode_inner(followed), strict=True):
            left, count = len(self.teacher.bytes[token]), 0
            while left > 0 and count < len(cut):
                left -= sizes[cut[count]]
                count += 1
            out.append(tuple(cut[:count]))
        return out

    def _try_student_tokens(self, control: set[int], teacher_control: set[int]) -> None:
        """Encode each student token with the teacher's tokenizer: a first token that is shorter may
        become it.
        """
        usable = [t for t, b in enumerate(self.student.bytes) if b and t not in control]
        texts = [t for t in usable if _is_text(self.student.bytes[t])]
        cuts = self.teacher.encode_inner([self.student.bytes[t].decode() for t in texts])
        for token, cut in zip(texts, cuts, strict=True):
            first = cut[0] if cut else None
            if first is None:
                continue
            ours, theirs = self.student.bytes[token], self.teacher.bytes[first]
            extends = (
                ours != theirs and ours.startswith(theirs) and self.known[first][:1] != (token,)
            )
            if extends or first in teacher_control:  # that is the unknown token
                self._open(first, 0, {token})

    def _open(self, token: int, size: int, candidates: set[int]) -> None:
        """Leave a teacher token's piece number `size` open between what is known and
        `candidates`.
        """
        known = self.known[token]
        if len(known) > size:
            candidates = candidates | {known[size]}
            self.open.pop(token, None)
        self.known[token] = known[:size]
        self.open[token] = self.open.get(token, set()) | candidates

    def _open_all(self, token: int, spelled: bytes, control: set[int]) -> None:
        """Leave part of a character open between all student tokens that may begin there."""
        may = {
            t
            for t, b in enumerate(self.student.bytes)
            if b and t not in control and (b.startswith(spelled) or spelled.startswith(b))
        }
        self._open(token, 0, may)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
