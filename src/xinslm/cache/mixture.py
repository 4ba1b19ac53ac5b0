"""A weighted mixture of sparse distributions as one sparse distribution, without bias.

Each part is h tokens exactly and the rest as mass with n tail samples, each of which represents 1/n
of it. All atoms, tail samples with their share of the mass, are put together by token. The tokens
with the largest exact share become the top k, with everything that is known of them; the others are
resampled at n evenly spaced points of their distribution function (one uniform number a
row), so that the expectation over the numbers is the mixture itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEGLIGIBLE = 1e-5
"""Mass without tail samples up to which the tail still counts as sampled."""


@dataclass(frozen=True)
class Masses:
    """Masses over tokens in each of N rows: a part times its weight there, or their sum."""

    top_k_ids: np.ndarray
    """(N, h) int64, distinct in a row."""
    top_k_mass: np.ndarray
    """(N, h) float64."""
    tail: np.ndarray
    """(N,) float64: the mass outside the top k."""
    tail_ids: np.ndarray
    """(N, n) int64: tail samples."""
    has_tail_samples: np.ndarray
    """(N,) bool: whether tail samples represent the tail; else only its mass is known."""


def mix(parts: Sequence[Masses], uniforms: np.ndarray, top_k: int, tail_samples: int) -> Masses:
    """Add up parts; uniforms (N,) in [0, 1) are independent of those they were drawn with.

    `top_k` is at most the smallest top k of the parts.
    """
    ids, exact, weights = _by_token(parts)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :top_k]
    rest = weights.copy()
    np.put_along_axis(rest, order, 0.0, axis=1)
    cumulative = rest.cumsum(axis=1)
    drawn_from = cumulative[:, -1]
    unsampled = [np.where(part.has_tail_samples, 0.0, part.tail) for part in parts]
    unknown = np.sum(unsampled, axis=0)
    return Masses(
        np.take_along_axis(ids, order, axis=1),
        np.take_along_axis(weights, order, axis=1),
        drawn_from + unknown,
        np.take_along_axis(ids, _systematic(cumulative, uniforms, tail_samples), axis=1),
        (unknown <= NEGLIGIBLE) & (drawn_from > 0) & (tail_samples > 0),
    )


def _by_token(parts: Sequence[Masses]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms (N, atoms) of all parts sorted by token: ids, exact share and total weight.

    The first of several atoms of a token has the sum; the others have weight 0 and exact share -1.
    """
    num_top_k = sum(part.top_k_mass.shape[1] for part in parts)
    ids = np.hstack([part.top_k_ids for part in parts] + [part.tail_ids for part in parts])
    shares = [
        np.repeat(np.where(part.has_tail_samples, part.tail / max(n, 1), 0.0)[:, None], n, axis=1)
        for part in parts
        for n in [part.tail_ids.shape[1]]
    ]
    weight = np.hstack([part.top_k_mass for part in parts] + shares)
    bits = ids.shape[1].bit_length()
    keys = np.sort(ids << bits | np.arange(ids.shape[1]), axis=1)
    ids, column = keys >> bits, keys & ((1 << bits) - 1)
    weight = np.take_along_axis(weight, column, axis=1)
    # A top-k token of a part without weight still comes before one that was only sampled.
    known = np.where(column < num_top_k, weight + 1e-300, 0.0)
    first = np.ones(ids.shape, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(first)
    exact, total = np.full(ids.shape, -1.0), np.zeros(ids.shape)
    exact[first] = np.add.reduceat(known.ravel(), starts)
    total[first] = np.add.reduceat(weight.ravel(), starts)
    return ids, exact, total


def _systematic(cumulative: np.ndarray, uniforms: np.ndarray, tail_samples: int) -> np.ndarray:
    """Columns (N, tail samples) at evenly spaced points of rows' cumulative weights (N, atoms)."""
    points = (uniforms[:, None] + np.arange(tail_samples)) / max(tail_samples, 1)
    points = points * cumulative[:, -1:]
    columns = (cumulative[:, None, :] <= points[:, :, None]).sum(axis=2)
    last = (cumulative < cumulative[:, -1:]).sum(axis=1)  # rounding must not pass the last mass
    return np.minimum(columns, np.minimum(last, cumulative.shape[1] - 1)[:, None])
