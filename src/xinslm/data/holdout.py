"""Selects the documents, or the ends of long ones, that are held out for validation.

The content of a document and the seed decide, so that adding data moves no document to the other
split, and copies of a document stay in one split. If this does not give the requested share,
because there are few or long documents, the ends of a few long ones are held out instead.
"""

import hashlib
import math

import numpy as np

TOLERANCE = 0.5
"""Maximum relative deviation of the share from the requested fraction."""
_MAX_CUT = 4
_MIN_TOKENS = 256
"""Shorter documents are not cut if there are others: their ends are too short to evaluate on."""


def draw_number(digest: bytes, seed: int) -> float:
    """Turn the hash of a document and the seed into a number that is uniform in [0, 1)."""
    drawn = hashlib.blake2b(digest, digest_size=6, key=str(seed).encode()).digest()
    return int.from_bytes(drawn, "big") / 2**48


def share_holds(held: int, total: int, fraction: float) -> bool:
    """Return whether `held` of `total` tokens is close enough to `fraction`."""
    return abs(held - fraction * total) <= TOLERANCE * fraction * total


def plan_holdout(
    lengths: np.ndarray,
    draws: np.ndarray,
    divisible: np.ndarray,
    fraction: float,
    limit: int | None = None,
) -> np.ndarray:
    """Return the number of tokens to hold out at the end of each document, (documents,) int64.

    Documents with draws below `fraction` are held out if their share is close enough to it, or if
    nothing else is possible. Otherwise, documents for which `divisible` is true may be cut, and at
    most `limit` tokens are held out. Copies (documents with equal draws) are treated equally.
    """
    total = int(lengths.sum())
    natural = np.where(draws < fraction, lengths, 0)
    held = int(natural.sum())
    if 0 < held < total and share_holds(held, total, fraction):
        return natural
    wanted = fraction * total if limit is None else min(fraction * total, limit)
    # from here, one entry per distinct text, in the order of their draws
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
    """Distribute `wanted` tokens over the ends of the first few long documents."""
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
