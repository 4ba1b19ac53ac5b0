"""Which tokens of many texts are computed together: common beginnings once.

The texts are sorted, so those with a common beginning are neighbours, and the lengths of the common
beginnings of neighbours describe the tree of all texts (LCP array, Manber and Myers 1990). Parts of
the tree become rows of at most `ROW_TOKENS` tokens, which branch (`model/tree.py`). A beginning
whose continuations do not fit into a row is computed once, as a prefix whose keys and values all of
them use.

    groups = plan(sequences, needed)
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

ROW_TOKENS = 512
"""Most tokens of a row that branches; a single text may be longer."""
LEAST_PREFIX = 16
"""Shorter beginnings are computed in each row: that is one forward pass less."""


@dataclass(frozen=True)
class Row:
    """Part of the tree in depth-first order, without the tokens of its group's prefix."""

    tokens: np.ndarray
    """Ids (T,) int64."""
    positions: np.ndarray
    """Depth of each token in its text, (T,) int64."""
    ends: np.ndarray
    """Where the descendants of each token end in the row, (T,) int64."""
    places: np.ndarray
    """Tokens of the row whose next-token distribution is needed, (n,) int64."""
    slots: np.ndarray
    """Where each of those belongs in the results, (n,) int64."""


@dataclass
class Group:
    """Rows that continue the same prefix."""

    level: int
    """Number of prefixes that this group's own one continues."""
    prefix: Row | None = None
    """The last of the group's prefixes; None if the rows begin at the beginning."""
    rows: list[Row] = field(default_factory=list)


class _Tree:
    """Sorted, different texts with the lengths of the beginnings that neighbours share.

    `needed` holds how many of its last tokens each text needs a distribution for, and `slots`
    where the first of these belongs in the results.
    """

    def __init__(self, texts: Sequence[np.ndarray], needed: np.ndarray, slots: np.ndarray) -> None:
        self.texts, self.needed, self.slots = texts, needed, slots
        self.lengths = np.array([len(text) for text in texts])
        shared = [0] + [_shared(a, b) for a, b in itertools.pairwise(texts)]
        self.shared = np.array(shared)
        self.new = np.concatenate([[0], np.cumsum(self.lengths - self.shared)])

    def size(self, low: int, high: int, depth: int) -> int:
        """Number of different tokens of texts [low, high) after the first `depth`."""
        rest = int(self.new[high] - self.new[low + 1])
        return int(self.lengths[low]) - depth + rest

    def wanted(self, text: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in [begin, end) of a text that need a distribution, and their slots."""
        first = int(self.lengths[text] - self.needed[text])
        positions = np.arange(max(begin, first), min(end, int(self.lengths[text])))
        return positions, self.slots[text] + positions - first

    def row(self, low: int, high: int, depth: int) -> Row:
        """The tree of texts [low, high), which share their first `depth` tokens, from there on."""
        size = self.size(low, high, depth)
        ends = np.full(size, size)
        path = np.zeros(0, np.int64)  # where the tokens of the present text are in the row
        tokens, positions, places, slots, filled = [], [], [], [], 0
        for text in range(low, high):
            kept = int(self.shared[text]) - depth if text > low else 0
            ends[path[kept:]] = filled
            new = self.texts[text][depth + kept :]
            path = np.concatenate([path[:kept], np.arange(filled, filled + len(new))])
            filled += len(new)
            tokens.append(new)
            positions.append(np.arange(depth + kept, depth + kept + len(new)))
            where, slot = self.wanted(text, depth, len(self.texts[text]))
            places.append(path[where - depth])
            slots.append(slot)
        ids, depths = (np.concatenate(part).astype(np.int64) for part in (tokens, positions))
        return Row(ids, depths, ends, np.concatenate(places), np.concatenate(slots))

    def prefix(self, low: int, high: int, depth: int, end: int) -> Row:
        """Tokens [depth, end), which texts [low, high) share."""
        found = [self.wanted(text, depth, end) for text in range(low, high)]
        tokens = self.texts[low][depth:end].astype(np.int64)
        positions = np.arange(depth, end)
        ends = np.full(len(tokens), len(tokens))
        places, slots = (np.concatenate(part) for part in zip(*found, strict=True))
        return Row(tokens, positions, ends, places - depth, slots)


def plan(
    texts: Sequence[np.ndarray], needed: np.ndarray, slots: np.ndarray, share: bool = True
) -> list[Group]:
    """Lay out texts in groups of rows.

    A group comes after the group whose prefix it continues (the last one of a lower level), so
    prefixes can be held on a stack.

    Args:
        texts: Different sequences of ids, none empty, sorted.
        needed: Number of last tokens of each whose next-token distribution is needed.
        slots: Index of the first of these in the results; a token that several texts share may
            have several slots.
        share: Whether tokens may be shared; if not, each text is a row.
    """
    tree = _Tree(texts, needed, slots)
    groups = [Group(0)]
    if not share:
        groups[0].rows = [tree.row(text, text + 1, 0) for text in range(len(texts))]
        return groups
    stack = [(0, len(texts), 0, groups[0])] if len(texts) else []
    while stack:
        low, high, depth, group = stack.pop()
        if high - low == 1 or tree.size(low, high, depth) <= ROW_TOKENS:
            if tree.size(low, high, depth):  # else the whole text is a prefix
                group.rows.append(tree.row(low, high, depth))
            continue
        shared = int(tree.shared[low + 1 : high].min())
        if shared - depth >= LEAST_PREFIX:
            group = Group(group.level + 1, tree.prefix(low, high, depth, shared))
            groups.append(group)
            depth = shared
        borders = low + 1 + np.flatnonzero(tree.shared[low + 1 : high] == shared)
        limits = [low, *borders.tolist(), high]
        stack += [(a, b, depth, group) for a, b in itertools.pairwise(limits)]
    return groups


def size(groups: Sequence[Group]) -> int:
    """Number of tokens that are computed."""
    rows = [row for group in groups for row in (group.prefix, *group.rows) if row is not None]
    return sum(len(row.tokens) for row in rows)


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter
