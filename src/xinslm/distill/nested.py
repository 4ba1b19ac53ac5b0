"""Teacher distributions for a student whose vocabulary is a merge prefix of the teacher's ("nested BPE").

A BPE with fewer merges stops earlier on the same way, so the student's tokens of a text are those of the teacher, each
split into fixed pieces. At a teacher boundary the next student token is the first piece of the next teacher token:
its distribution is an exact push-forward, a sum over teacher tokens. Inside a teacher token, after pieces s, it is the
same sum over the teacher tokens whose pieces begin with s, renormalised; where a teacher token is s itself and ends
there, what follows is not known, and that mass is left out (the cache keeps it in the tail).
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import XinslmError

Pieces = tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """Student positions over teacher positions, for one text or many one behind the other."""

    teacher_ids: np.ndarray
    """Teacher's tokens of the same text."""
    rows: np.ndarray
    """For each student token but the first: the teacher position whose distribution covers it; never falls."""
    prefixes: list[Pieces]
    """For each of those: the pieces of the covered teacher token that have come already."""


class PushForward:
    """Maps teacher distributions (N, teacher vocabulary) to student ones (N, student vocabulary)."""

    def __init__(self, student: Any, teacher: Any) -> None:
        from xinslm.tokenizer.nested import prefix_pieces

        self.student, self.teacher = student, teacher
        self.pieces: list[Pieces] = prefix_pieces(student, teacher)
        nowhere = student.vocab_size  # column that collects the mass of tokens the student cannot write
        self.first = torch.tensor([p[0] if p else nowhere for p in self.pieces])
        self.specials = _map_specials(student, teacher)
        self._continuations: dict[Pieces, tuple[Tensor, Tensor]] = {}
        self._by_first: dict[int, list[int]] = defaultdict(list)
        for token, pieces in enumerate(self.pieces):
            if len(pieces) > 1 or (len(pieces) == 1 and pieces[0] not in student.special_tokens.values()):
                self._by_first[pieces[0]].append(token)

    def align(self, ids: np.ndarray) -> Alignment:
        """Encode a document's student ids anew with the teacher's tokenizer and match the two."""
        teacher_ids: list[int] = []
        for run in self._runs(ids.tolist()):
            if isinstance(run, int):
                teacher_ids.append(run)
            else:
                teacher_ids.extend(self.teacher.encode(self.student.decode(run)))
        special_back = {theirs: ours for ours, theirs in self.specials.items()}
        rows: list[int] = []
        prefixes: list[Pieces] = []
        rebuilt: list[int] = []
        for row, token in enumerate(teacher_ids):
            pieces = (special_back[token],) if token in special_back else self.pieces[token]
            for count in range(len(pieces)):
                rows.append(row - 1)
                prefixes.append(pieces[:count])
            rebuilt.extend(pieces)
        if rebuilt != ids.tolist():
            raise XinslmError(
                "a document's student tokens are not the pieces of its teacher tokens; the text may hold bytes that "
                f"are not UTF-8. It begins with {self.student.decode(ids[:20].tolist())!r}"
            )
        return Alignment(np.array(teacher_ids, dtype=np.int64), np.array(rows[1:], dtype=np.int64), prefixes[1:])

    def _runs(self, ids: list[int]) -> list[list[int] | int]:
        """Ordinary student ids between special ones, and the teacher's ids of the special ones."""
        runs: list[list[int] | int] = []
        specials = set(self.student.special_tokens.values())
        for token in ids:
            if token in specials:
                if token not in self.specials:
                    name = next(n for n, i in self.student.special_tokens.items() if i == token)
                    raise XinslmError(f"the teacher's tokenizer has no special token for the student's {name!r}")
                runs.append(self.specials[token])
            elif runs and isinstance(runs[-1], list):
                runs[-1].append(token)
            else:
                runs.append([token])
        return runs

    def __call__(self, probs: Tensor, prefixes: list[Pieces]) -> Tensor:
        """Push teacher probabilities (N, teacher vocabulary) forward, each after its `prefixes[n]`."""
        count, width = probs.shape[0], self.student.vocab_size
        out = probs.new_zeros(count, width + 1)
        out.index_add_(1, self.first.to(probs.device), probs)
        for n, prefix in enumerate(prefixes):
            if prefix:
                tokens, following = self._after(prefix)
                mass = probs[n, tokens.to(probs.device)]
                out[n] = 0.0
                out[n].index_add_(0, following.to(probs.device), mass / mass.sum().clamp_min(1e-30))
        return out[:, :width]

    def _after(self, prefix: Pieces) -> tuple[Tensor, Tensor]:
        """Teacher tokens whose pieces begin with `prefix`, and the piece that follows in each (or the lost column)."""
        if prefix not in self._continuations:
            size = len(prefix)
            tokens = [t for t in self._by_first[prefix[0]] if self.pieces[t][:size] == prefix]
            following = [
                self.pieces[t][size] if len(self.pieces[t]) > size else self.student.vocab_size for t in tokens
            ]
            self._continuations[prefix] = (torch.tensor(tokens), torch.tensor(following))
        return self._continuations[prefix]


def _map_specials(student: Any, teacher: Any) -> dict[int, int]:
    """Student's special ids -> the teacher's, by content, else by role."""
    table = {
        i: teacher.special_tokens[name] for name, i in student.special_tokens.items() if name in teacher.special_tokens
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
