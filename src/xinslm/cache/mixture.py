"""A weighted mixture of sparse distributions as one sparse distribution, without bias.

Each part is h tokens exactly and the rest as mass with tail samples, each of which represents an
equal part of it. All atoms, tail samples with their share of the mass, are put together by token.
The tokens with the largest exact share become the top k, with everything that is known of them; the
others are resampled at evenly spaced points of their distribution function (one uniform number a
row), so that the expectation over the numbers is the mixture itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from xinslm.cache.entries import num_samples

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
    """(N, n) int64: tail samples, of which the first `num_samples` count."""
    num_samples: np.ndarray
    """(N,) int64: tail samples that represent the tail; if 0, only its mass is known."""


def mix(parts: Sequence[Masses], uniforms: np.ndarray, top_k: int, sample_mass: float) -> Masses:
    """Add up parts; uniforms (N,) in [0, 1) are independent of those they were drawn with.

    `top_k` is at most the smallest top k of the parts. A tail sample stands for at most
    `sample_mass`; if that is 0, there are none.
    """
    ids, exact, weights = _by_token(parts)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :top_k]
    rest = weights.copy()
    np.put_along_axis(rest, order, 0.0, axis=1)
    cumulative = rest.cumsum(axis=1)
    drawn_from = cumulative[:, -1]
    unknown = np.sum([np.where(part.num_samples > 0, 0.0, part.tail) for part in parts], axis=0)
    counts = np.zeros(len(ids), np.int64)
    if sample_mass:
        wanted = num_samples(torch.from_numpy(drawn_from), sample_mass).numpy()
        counts = np.where(unknown <= NEGLIGIBLE, wanted, 0)
    return Masses(
        np.take_along_axis(ids, order, axis=1),
        np.take_along_axis(weights, order, axis=1),
        drawn_from + unknown,
        np.take_along_axis(ids, _systematic(cumulative, uniforms, counts), axis=1),
        counts,
    )


def _by_token(parts: Sequence[Masses]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms (N, atoms) of all parts sorted by token: ids, exact share and total weight.

    The first of several atoms of a token has the sum; the others have weight 0 and exact share -1.
    """
    num_top_k = sum(part.top_k_mass.shape[1] for part in parts)
    ids = np.hstack([part.top_k_ids for part in parts] + [part.tail_ids for part in parts])
    shares = [
        np.where(
            np.arange(part.tail_ids.shape[1]) < part.num_samples[:, None],
            (part.tail / np.maximum(part.num_samples, 1))[:, None],
            0.0,
        )
        for part in parts
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


def _systematic(cumulative: np.ndarray, uniforms: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Columns (N, largest count) at evenly spaced points of rows' cumulative weights (N, atoms).

    The last ones of a row repeat.
    """
    steps = np.minimum(np.arange(counts.max(initial=0)), np.maximum(counts - 1, 0)[:, None])
    points = (uniforms[:, None] + steps) / np.maximum(counts, 1)[:, None] * cumulative[:, -1:]
    columns = torch.searchsorted(
        torch.from_numpy(cumulative), torch.from_numpy(points), right=True
    ).numpy()
    last = (cumulative < cumulative[:, -1:]).sum(axis=1)  # rounding must not pass the last mass
    return np.minimum(columns, np.minimum(last, cumulative.shape[1] - 1)[:, None])
