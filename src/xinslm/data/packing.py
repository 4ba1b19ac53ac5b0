"""Cuts documents into sequences and packs sequences into rows of one fixed length.

Packing is best-fit decreasing: the longest sequence first, each into the row with the least
sufficient space. Rows with equal space are interchangeable, so all sequences of one length are
placed at once: a million sequences take less than a second, and the result depends only on the
lengths. Segment numbers restrict attention, positions restart in every sequence, and `stream` is
the index of each input in the dataset, by which the teacher's cache finds its entry.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from xinslm.data.dataset import Split
from xinslm.errors import UsageError

IGNORE = -100
"""Label of a position without target, as in `torch.nn.functional.cross_entropy`."""
_Rows = dict[int, list[np.ndarray]]


@dataclass(frozen=True)
class Batch:
    """Rows of packed sequences; all arrays are int64 of shape (rows, row_length)."""

    input_ids: np.ndarray
    """Token of each position; 0 on padding."""
    labels: np.ndarray
    """The next token of the document; -100 if it is masked, and on padding."""
    positions: np.ndarray
    """Position inside the sequence, from 0; 0 on padding."""
    segments: np.ndarray
    """Number of the sequence inside its row, from 0; -1 on padding."""
    stream: np.ndarray
    """Index of this input in the split's token stream; -1 on padding."""


def sequences(documents: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `max_length` inputs; return starts and lengths, int64.

    `documents` holds offsets into the token stream, (n+1,). A document of n tokens has n-1 inputs
    (its last token predicts nothing); pieces do not overlap: each token but the first is a target
    once.
    """
    if max_length < 1:
        raise UsageError(f"a row must have at least 1 token, not {max_length}")
    documents = np.asarray(documents, np.int64)
    inputs = np.maximum(np.diff(documents) - 1, 0)
    pieces = -(-inputs // max_length)
    skipped = _ramps(pieces) * max_length
    starts = np.repeat(documents[:-1], pieces) + skipped
    return starts, np.minimum(np.repeat(inputs, pieces) - skipped, max_length)


def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribute sequences over rows: row r is order[offsets[r]:offsets[r+1]], both int64.

    Both are int64. Sequences keep their order within a row. UsageError if one is longer than
    `row_length`.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and (lengths.max() > row_length or lengths.min() < 1):
        wrong = lengths[(lengths > row_length) | (lengths < 1)][0]
        raise UsageError(f"a sequence of {wrong} tokens cannot be packed into rows of {row_length}")
    row_of = np.empty(len(lengths), np.int64)
    num_rows = 0
    # open_rows[space]: rows with that much space left, as arrays that are joined on demand
    open_rows: _Rows = {}
    by_length = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[by_length], prepend=-1, append=-1))
    for begin, end in pairwise(bounds):
        left = by_length[begin:end]
        length = int(lengths[left[0]])
        # Filling a row only adds spaces smaller than the current one, so the spaces that exist now
        # suffice.
        for space in sorted(space for space in open_rows if space >= length):
            if len(left):
                rows = np.concatenate(open_rows.pop(space))
                left = _fill(rows, space, length, left, row_of, open_rows)
        if len(left):
            rows = np.arange(num_rows, num_rows - (-len(left) // (row_length // length)))
            num_rows += len(rows)
            _fill(rows, row_length, length, left, row_of, open_rows)
    offsets = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=offsets[1:])
    return np.argsort(row_of, kind="stable"), offsets


def _fill(
    rows: np.ndarray,
    space: int,
    length: int,
    left: np.ndarray,
    row_of: np.ndarray,
    open_rows: _Rows,
) -> np.ndarray:
    """Fill rows of equal space with sequences of equal length; return the sequences left over."""
    each = space // length
    full = min(len(rows), len(left) // each)
    placed = full * each
    row_of[left[:placed]] = np.repeat(rows[:full], each)
    _append(open_rows, space - each * length, rows[:full])
    rows, left = rows[full:], left[placed:]
    if len(rows) and len(left):
        row_of[left] = rows[0]
        _append(open_rows, space - len(left) * length, rows[:1])
        rows, left = rows[1:], left[:0]
    _append(open_rows, space, rows)
    return left


def _append(open_rows: _Rows, space: int, rows: np.ndarray) -> None:
    if len(rows):
        open_rows.setdefault(space, []).append(rows)


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """Return the concatenation of 0..n-1 for every n of `lengths`."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class PackedDataset:
    """A split as rows of `row_length` tokens, each built on demand.

    No sequence is longer than `max_length` (default: `row_length`), the context a model needs. Rows
    of several times `max_length` have less padding if documents are slightly longer than half of
    it.
    """

    def __init__(self, split: Split, row_length: int, max_length: int | None = None) -> None:
        self.split = split
        self.row_length = row_length
        starts, lengths = sequences(split.documents, min(max_length or row_length, row_length))
        order, self._offsets = pack(lengths, row_length)
        self._starts, self._lengths = starts[order], lengths[order]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def fill(self) -> float:
        """Fraction of the positions that are not padding."""
        return float(self._lengths.sum()) / max(len(self) * self.row_length, 1)

    def batch(self, indices: np.ndarray | list[int]) -> Batch:
        """Build the rows with these indices."""
        indices = np.asarray(indices, np.int64)
        counts = self._offsets[indices + 1] - self._offsets[indices]  # sequences in each row
        segment = _ramps(counts)
        row = np.repeat(np.arange(len(indices)), counts)
        chosen = np.repeat(self._offsets[indices], counts) + segment
        lengths = self._lengths[chosen]
        position = _ramps(lengths)
        stream = np.repeat(self._starts[chosen], lengths) + position
        row = np.repeat(row, lengths)
        column = _ramps(np.bincount(row, minlength=len(indices)))

        def scatter(values: np.ndarray, pad: int) -> np.ndarray:
            out = np.full((len(indices), self.row_length), pad, np.int64)
            out[row, column] = values
            return out

        targets = self.split.tokens[stream + 1].astype(np.int64)
        return Batch(
            input_ids=scatter(self.split.tokens[stream], 0),
            labels=scatter(np.where(self.split.mask[stream + 1] != 0, targets, IGNORE), IGNORE),
            positions=scatter(position, 0),
            segments=scatter(np.repeat(segment, lengths), -1),
            stream=scatter(stream, -1),
        )
