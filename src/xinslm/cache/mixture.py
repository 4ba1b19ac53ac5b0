"""A weighted mixture of sparse distributions as one sparse distribution, without bias.

Each part is h tokens exactly and the rest as mass with n draws, each of which stands for 1/n of it.
All atoms, draws with their share of the mass, are put together by token. The tokens with the
largest exact share become the head, with everything that is known of them; the others are drawn
from again at n evenly spaced points of their distribution function (one uniform number a row), so
that the expectation over the numbers is the mixture itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEGLIGIBLE = 1e-5
"""Mass without draws up to which the tail still counts as drawn."""


@dataclass(frozen=True)
class Part:
    """One distribution of each of N rows, times its weight there."""

    head_ids: np.ndarray
    """(N, h) int64, distinct in a row."""
    head: np.ndarray
    """(N, h) float64: weight times probability."""
    tail: np.ndarray
    """(N,) float64: weight times the mass outside the head."""
    draws: np.ndarray
    """(N, n) int64."""
    has_draws: np.ndarray
    """(N,) bool: whether the draws stand for the tail; where not, nothing is known of it but its
    mass.
    """


@dataclass(frozen=True)
class Mixture:
    """The sum of the parts."""

    head_ids: np.ndarray
    """(N, head) int64."""
    head: np.ndarray
    """(N, head) float64."""
    tail: np.ndarray
    """(N,) float64."""
    draws: np.ndarray
    """(N, draws) int64."""
    has_draws: np.ndarray
    """(N,) bool."""


def mix(parts: Sequence[Part], uniforms: np.ndarray, head: int, draws: int) -> Mixture:
    """Add up parts of N rows; uniforms (N,) in [0, 1), independent of those the parts were drawn
    with.

    `head` is at most the smallest head of the parts.
    """
    ids, exact, weights = _by_token(parts)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :head]
    rest = weights.copy()
    np.put_along_axis(rest, order, 0.0, axis=1)
    cumulative = rest.cumsum(axis=1)
    drawn_from = cumulative[:, -1]
    unknown = sum((np.where(part.has_draws, 0.0, part.tail) for part in parts), np.zeros(len(ids)))
    return Mixture(
        np.take_along_axis(ids, order, axis=1),
        np.take_along_axis(weights, order, axis=1),
        drawn_from + unknown,
        np.take_along_axis(ids, _systematic(cumulative, uniforms, draws), axis=1),
        (unknown <= NEGLIGIBLE) & (drawn_from > 0) & (draws > 0),
    )


def _by_token(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms of all parts, each row sorted by token: ids, exact share and whole weight, all (N,
    atoms).

    The first of several atoms of a token has the sum; the others have weight 0 and exact share -1.
    """
    heads = sum(part.head.shape[1] for part in parts)
    ids = np.concatenate([part.head_ids for part in parts] + [part.draws for part in parts], axis=1)
    weight = np.zeros(ids.shape)
    weight[:, :heads] = np.concatenate([part.head for part in parts], axis=1)
    at = heads
    for part in parts:
        count = part.draws.shape[1]
        weight[:, at : at + count] = np.where(part.has_draws, part.tail / max(count, 1), 0.0)[
            :, None
        ]
        at += count
    bits = ids.shape[1].bit_length()
    keys = np.sort(ids << bits | np.arange(ids.shape[1]), axis=1)
    ids, column = keys >> bits, keys & ((1 << bits) - 1)
    weight = np.take_along_axis(weight, column, axis=1)
    # A head token of a part without weight still comes before one that was only drawn.
    known = np.where(column < heads, weight + 1e-300, 0.0)
    first = np.ones(ids.shape, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(first)
    exact, whole = np.full(ids.shape, -1.0), np.zeros(ids.shape)
    exact[first] = np.add.reduceat(known.ravel(), starts)
    whole[first] = np.add.reduceat(weight.ravel(), starts)
    return ids, exact, whole


def _systematic(cumulative: np.ndarray, uniforms: np.ndarray, draws: int) -> np.ndarray:
    """Columns (N, draws) at evenly spaced points of rows' cumulative weights (N, atoms)."""
    points = (uniforms[:, None] + np.arange(draws)) / max(draws, 1) * cumulative[:, -1:]
    columns = (cumulative[:, None, :] <= points[:, :, None]).sum(axis=2)
    last = (cumulative < cumulative[:, -1:]).sum(axis=1)  # rounding must not pass the last mass
    return np.minimum(columns, np.minimum(last, cumulative.shape[1] - 1)[:, None])
