"""Sums of teacher probabilities over student tokens, by tables.

At a boundary of both tokenizers each teacher token has one column: the student token that it begins
with. Inside a teacher token, after pieces s, the teacher tokens that begin with s share their mass
out over the piece that follows; these tables are concatenated, one per prefix number. Number
0 is the boundary, -1 a place that has no table. The column after the last collects what the
student cannot write or nobody knows; it is cut off, so that rows sum to less than 1 by it (the
cache keeps it as tail without tail samples).
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Pieces = tuple[int, ...]


def number_prefixes(sequences: Iterable[Pieces]) -> dict[Pieces, int]:
    """Number the proper prefixes of piece sequences, from 1; the empty one is 0."""
    numbers: dict[Pieces, int] = {(): 0}
    for pieces in sequences:
        for size in range(1, len(pieces)):
            numbers.setdefault(pieces[:size], len(numbers))
    return numbers


class Tables:
    """Applies the tables to rows of teacher probabilities."""

    def __init__(self, width: int, first: np.ndarray, entries: list[tuple[int, int, int]]) -> None:
        """`first`: a column for each teacher token; `entries`: (prefix number, teacher token,
        column); `width` is the number of columns, and as a column the place of what is lost.
        """
        self.width = width
        self.first = torch.from_numpy(np.asarray(first, dtype=np.int64))
        flat = np.array(sorted(entries), dtype=np.int64).reshape(-1, 3)
        count = int(flat[:, 0].max(initial=0)) + 1
        self.starts = torch.from_numpy(np.searchsorted(flat[:, 0], np.arange(count + 1)))
        self.tokens, self.columns = (
            torch.from_numpy(flat[:, 1].copy()),
            torch.from_numpy(flat[:, 2].copy()),
        )

    def __call__(self, probs: Tensor, numbers: np.ndarray | Tensor) -> Tensor:
        """Push teacher probabilities (N, teacher vocabulary) forward, row n by table `numbers[n]`;
        (N, width).
        """
        device = probs.device
        which = torch.as_tensor(numbers, dtype=torch.int64)
        out = probs.new_zeros(len(which), self.width + 1)
        out.index_add_(1, self.first.to(device), probs)
        inside = torch.nonzero(which > 0)[:, 0]
        if len(inside):
            table = which[inside]
            sizes = self.starts[table + 1] - self.starts[table]
            rows = torch.repeat_interleave(torch.arange(len(inside)), sizes)
            ends = sizes.cumsum(0)
            entry = torch.arange(int(ends[-1])) - torch.repeat_interleave(
                ends - sizes - self.starts[table], sizes
            )
            row = inside[rows].to(device)
            mass = probs[row, self.tokens[entry].to(device)]
            total = probs.new_zeros(len(which)).index_add_(0, row, mass).clamp_min_(1e-30)
            out[inside.to(device)] = 0.0
            place = row * (self.width + 1) + self.columns[entry].to(device)
            out.view(-1).index_add_(0, place, mass / total[row])
        return out[:, : self.width]
