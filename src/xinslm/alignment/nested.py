"""Teacher distributions for a student whose vocabulary is a merge prefix of the teacher's ("nested
BPE").

A BPE with fewer merges stops earlier on the same way, so the student's tokens of a text are those
of the teacher, each split into fixed pieces. At a teacher boundary the next student token is the
first piece of the next teacher token: its distribution is an exact push-forward, a sum over teacher
tokens. Inside a teacher token, after pieces s, it is the same sum over the teacher tokens whose
pieces begin with s, renormalised; where a teacher token is s itself and ends there, what follows is
not known, and that mass is left out (the cache keeps it in the tail).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from xinslm.alignment.projection import Pieces, Tables, number_prefixes
from xinslm.errors import XinslmError
from xinslm.tokenizer.nested import prefix_pieces


@dataclass(frozen=True)
class NestedAlignment:
    """Student positions over teacher positions, for one text or several, concatenated."""

    teacher_ids: np.ndarray
    """Teacher's tokens of the same text."""
    rows: np.ndarray
    """For each student token but the first: the teacher position whose distribution covers it;
    never falls.
    """
    prefixes: np.ndarray
    """For each of those: the number of the pieces of the covered teacher token that have come
    already; 0 at a teacher boundary, -1 where the teacher's distribution does not cover the
    student's next token. int64."""


class NestedProjection:
    """Maps teacher distributions (N, teacher vocabulary) to student ones (N, student
    vocabulary).
    """

    kind = "nested"

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student, self.teacher = student, teacher
        self.pieces: list[Pieces] = prefix_pieces(student, teacher)
        self.specials = map_specials(student, teacher)
        for ours, theirs in self.specials.items():
            self.pieces[theirs] = (ours,)
        numbers, nowhere = number_prefixes(self.pieces), student.vocab_size
        entries = [
            (numbers[pieces[:size]], token, pieces[size] if size < len(pieces) else nowhere)
            for token, pieces in enumerate(self.pieces)
            for size in range(1, len(pieces) + 1)
            if pieces[:size] in numbers
        ]
        self.tables = Tables(
            nowhere, np.array([p[0] if p else nowhere for p in self.pieces]), entries
        )
        self._counts = np.array([len(p) for p in self.pieces], dtype=np.int64)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._pieces = np.array([piece for p in self.pieces for piece in p], dtype=np.int64)
        self._numbers = np.array(
            [numbers[p[:size]] for p in self.pieces for size in range(len(p))], dtype=np.int64
        )

    def __call__(self, probs: Tensor, prefixes: np.ndarray) -> Tensor:
        """Push teacher probabilities (N, teacher vocabulary) forward, each after the pieces number
        `prefixes[n]`.
        """
        return self.tables(probs, prefixes)

    def align(self, ids: np.ndarray) -> NestedAlignment:
        """Encode a document with the teacher's tokenizer and match the two tokenizations."""
        ids = ids.astype(np.int64)
        teacher_ids = np.concatenate(
            [np.zeros(0, np.int64), *map(self._encode, self._runs(ids))]
        ).astype(np.int64)
        counts = self._counts[teacher_ids]
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(
            self._offsets[teacher_ids] - ends + counts, counts
        )
        if not np.array_equal(self._pieces[places], ids):
            raise XinslmError(
                "a document's student tokens are not the pieces of its teacher tokens; the text "
                "may hold bytes that "
                f"are not UTF-8. It begins with {self.student.decode(ids[:20].tolist())!r}"
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
        return [
            run
            for run in np.split(ids, np.unique([*places, *(places + 1)]).astype(int))
            if len(run)
        ]


def map_specials(student: Any, teacher: Any) -> dict[int, int]:
    """Student's special ids -> the teacher's, by content, else by role."""
    table = {
        i: teacher.special_tokens[name]
        for name, i in student.special_tokens.items()
        if name in teacher.special_tokens
    }
    for role in ("bos_id", "eos_id", "pad_id"):
        ours, theirs = getattr(student, role), getattr(teacher, role)
        if ours is not None and theirs is not None:
            table.setdefault(ours, theirs)
    return table


def is_nested(student: Any, teacher: Any) -> bool:
    """Whether the student's merges are the first of the teacher's, under the same split rule."""
    try:
        same_split = student.split_name == teacher.split_name
        return same_split and student.merges == teacher.merges[: len(student.merges)]
    except AttributeError:
        return False
