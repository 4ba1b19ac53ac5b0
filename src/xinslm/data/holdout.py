"""Which documents, or which ends of long ones, are held back for validation.

A document's own content and the seed decide, so that data added later moves no document to the
other split, and copies of a document stay together. Few or long documents cannot give the share
that was asked for in this way: then the ends of a few long ones are held back instead.
"""

import hashlib
import math

import numpy as np

TOLERANCE = 0.5
"""How far the share may be from the fraction asked for, relative to it."""
_MAX_CUT = 4
_MIN_TOKENS = 256
"""Shorter documents are not cut, if there are others: their ends say little."""


def draw_number(digest: bytes, seed: int) -> float:
    """Turn the hash of a document and the seed into a number that is uniform in [0, 1)."""
    drawn = hashlib.blake2b(digest, digest_size=6, key=str(seed).encode()).digest()
    return int.from_bytes(drawn, "big") / 2**48


def share_holds(held: int, total: int, fraction: float) -> bool:
    """Whether `held` of `total` tokens is close enough to `fraction`."""
    return abs(held - fraction * total) <= TOLERANCE * fraction * total


def plan_holdout(
    lengths: np.ndarray,
    draws: np.ndarray,
    divisible: np.ndarray,
    fraction: float,
    limit: int | None = None,
) -> np.ndarray:
    """Number of tokens at the end of each document to hold back, (documents,) int64.

    Documents with draws below `fraction` are held back if this gives about the share asked for, or
    if there is no other way. `divisible` tells which documents can be cut; at most `limit` tokens
    are held back then. Copies (documents of one draw) are treated alike.
    """
    total = int(lengths.sum())
    natural = np.where(draws < fraction, lengths, 0)
    held = int(natural.sum())
    if 0 < held < total and share_holds(held, total, fraction):
        return natural
    wanted = fraction * total if limit is None else min(fraction * total, limit)
    # from here on, one entry for each distinct text, in the order of their draws
    _, first, group, copies = np.unique(
        draws, return_index=True, return_inverse=True, return_counts=True
    )
    sizes = lengths[first] * copies
    can_cut = divisible[first] & ((lengths[first] >= _MIN_TOKENS) | (len(sizes) == 1))
    is_long = can_cut & (sizes > TOLERANCE * wanted)
    tails = _cut_long(sizes, is_long, min(wanted, fraction * int(sizes[is_long].sum())))
    rest = wanted - int(tails.sum())
    for index in np.flatnonzero(~is_long):
        if sizes[index] < 2 * rest and (limit is None or tails.sum() + sizes[index] <= limit):
            tails[index] = sizes[index]
            rest -= int(sizes[index])
    if len(sizes) > 1 and not tails.any():
        index = np.flatnonzero(sizes <= 1.25 * sizes.min())[0]
        if limit is None or sizes[index] <= limit:
            tails[index] = sizes[index]
    elif int(tails.sum()) == total:
        tails[-1] = sizes[-1] - copies[-1] if len(sizes) == 1 and can_cut[0] else 0
    return (tails // copies)[group]


def _cut_long(sizes: np.ndarray, is_long: np.ndarray, wanted: float) -> np.ndarray:
    """Spread `wanted` tokens over the ends of a few long documents: the first in order."""
    tails = np.zeros_like(sizes)
    if not is_long.any():
        return tails
    most = max(math.ceil(wanted / min(_MAX_CUT, int(is_long.sum()))), _MIN_TOKENS)
    for index in np.flatnonzero(is_long):
        tails[index] = round(min(sizes[index], most, wanted))
        wanted -= int(tails[index])
        if wanted < 1:
            break
    return tails
