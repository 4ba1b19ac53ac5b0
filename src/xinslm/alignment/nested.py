"""Teacher distributions for a student whose vocabulary is a merge prefix of the teacher's ("nested
BPE").

A BPE with fewer merges stops earlier on the same way, so the student's tokens of a text are those
of the teacher, each split into fixed pieces. At a teacher boundary the next student token is the
first piece of the next teacher token: its distribution is an exact push-forward, a sum over teacher
tokens. Inside a teacher token, after pieces s, it is the same sum over the teacher tokens whose
pieces begin with s, renormalised; where a teacher token is s itself and ends there, what follows is
not known, and that mass is left out (the cache keeps it in the tail). The sums are tables with one
entry per teacher token, concatenated; number 0 is the boundary, each other number one s.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.alignment.spans import map_specials
from xinslm.errors import XinslmError
from xinslm.tokenizer.nested import prefix_pieces

Pieces = tuple[int, ...]


def number_prefixes(sequences: Iterable[Pieces]) -> dict[Pieces, int]:
    """Number the proper prefixes of piece sequences, from 1; the empty one is 0."""
    numbers: dict[Pieces, int] = {(): 0}
    for pieces in sequences:
        for size in range(1, len(pieces)):
            numbers.setdefault(pieces[:size], len(numbers))
    return numbers


@dataclass(frozen=True)
class NestedAlignment:
    """Student positions over teacher positions, for one text or several, concatenated."""

    teacher_ids: np.ndarray
    """Teacher's tokens of the same text."""
    rows: np.ndarray
    """For each student token but the first, the teacher position that covers it; never falls."""
    prefixes: np.ndarray
    """For each of those: the number of the pieces of the covered teacher token that have come
    already; 0 at a teacher boundary, -1 where the teacher's distribution does not cover the
    student's next token. int64."""


class NestedProjection:
    """Maps teacher distributions (N, teacher ids) to student ones (N, student ids)."""

    kind = "nested"

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student, self.teacher = student, teacher
        self.pieces: list[Pieces] = prefix_pieces(student, teacher)
        self.specials = map_specials(student, teacher)
        for ours, theirs in self.specials.items():
            self.pieces[theirs] = (ours,)
        numbers = number_prefixes(self.pieces)
        self._nowhere = student.vocab_size  # column of the mass that is left out
        entries = [
            (numbers[pieces[:size]], token, pieces[size] if size < len(pieces) else self._nowhere)
            for token, pieces in enumerate(self.pieces)
            for size in range(1, len(pieces) + 1)
            if pieces[:size] in numbers
        ]
        table = np.array(sorted(entries), dtype=np.int64).reshape(-1, 3)
        starts = np.searchsorted(table[:, 0], np.arange(len(numbers) + 1))
        self._first = torch.tensor([p[0] if p else self._nowhere for p in self.pieces])
        self._starts = torch.from_numpy(starts)
        self._tokens, self._columns = torch.from_numpy(table[:, 1:].T.copy())
        self._counts = np.array([len(p) for p in self.pieces], dtype=np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._pieces = np.array([piece for p in self.pieces for piece in p], dtype=np.int64)
        numbered = [numbers[p[:size]] for p in self.pieces for size in range(len(p))]
        self._numbers = np.array(numbered, dtype=np.int64)

    def __call__(self, probs: Tensor, prefixes: np.ndarray) -> Tensor:
        """Push (N, teacher ids) forward to (N, student ids), row n by the table `prefixes[n]`."""
        device, which = probs.device, torch.as_tensor(prefixes, dtype=torch.int64)
        out = probs.new_zeros(len(which), self._nowhere + 1)
        out.index_add_(1, self._first.to(device), probs)
        inside = torch.nonzero(which > 0)[:, 0]
        if len(inside):
            table = which[inside]
            sizes = self._starts[table + 1] - self._starts[table]
            rows = torch.repeat_interleave(torch.arange(len(inside)), sizes)
            shifts = self._starts[table] - sizes.cumsum(0) + sizes
            entry = torch.arange(len(rows)) + torch.repeat_interleave(shifts, sizes)
            row = inside[rows].to(device)
            mass = probs[row, self._tokens[entry].to(device)]
            total = probs.new_zeros(len(which)).index_add_(0, row, mass).clamp_min_(1e-30)
            out[inside.to(device)] = 0.0
            place = row * out.shape[1] + self._columns[entry].to(device)
            out.view(-1).index_add_(0, place, mass / total[row])
        return out[:, : self._nowhere]

    def align(self, ids: np.ndarray) -> NestedAlignment:
        """Encode a document with the teacher's tokenizer and match the two tokenizations."""
        ids = ids.astype(np.int64)
        encoded = map(self._encode, self._runs(ids))
        teacher_ids = np.concatenate([np.zeros(0, np.int64), *encoded]).astype(np.int64)
        counts = self._counts[teacher_ids]
        shifts = self._offsets[teacher_ids] - np.cumsum(counts) + counts
        places = np.arange(counts.sum()) + np.repeat(shifts, counts)
        if not np.array_equal(self._pieces[places], ids):
            raise XinslmError(
                "a document's student tokens are not the pieces of its teacher tokens; its text "
                "may hold bytes that are not UTF-8. "
                f"It begins with {self.student.decode(ids[:20].tolist())!r}"
            )
        rows = np.repeat(np.arange(len(teacher_ids)), counts) - 1
        return NestedAlignment(teacher_ids, rows[1:], self._numbers[places][1:])

    def _encode(self, run: np.ndarray) -> np.ndarray:
        """Teacher ids of a run of student ids, which is a single special token or has none."""
        if len(run) == 1 and int(run[0]) in self.specials:
            return np.array([self.specials[int(run[0])]])
        return np.array(self.teacher.encode(self.student.decode(run.tolist())), dtype=np.int64)

    def _runs(self, ids: np.ndarray) -> list[np.ndarray]:
        """Ordinary student ids between special ones, and the special ones each alone."""
        special = np.array(sorted(self.student.special_tokens.values()), dtype=np.int64)
        places = np.flatnonzero(np.isin(ids, special))
        for token in ids[places]:
            if int(token) not in self.specials:
                name = next(n for n, i in self.student.special_tokens.items() if i == token)
                raise XinslmError(
                    f"the teacher's tokenizer has no special token for the student's {name!r}"
                )
        cuts = np.unique([*places, *(places + 1)]).astype(int)
        return [run for run in np.split(ids, cuts) if len(run)]


def is_nested(student: Any, teacher: Any) -> bool:
    """Whether the student's merges are the first of the teacher's, under the same split rule."""
    try:
        same_split = student.split_name == teacher.split_name
        return same_split and student.merges == teacher.merges[: len(student.merges)]
    except AttributeError:
        return False
