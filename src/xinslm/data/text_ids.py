"""Recognizes texts that calibrated a model, by the hashes of their tokens.

`xinslm quantize` stores the ids of its calibration documents in the manifest, and exports pass them
on, so that an evaluation on the same text is refused without the dataset. Special tokens are left
out, so a document has one id whether it comes from a dataset or from the raw file.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from xinslm.data.dataset import Split

LONG = 64
"""Tokens from which a text is also recognized as the beginning of a longer one: `xinslm prepare`
holds out the ends of long documents. Shorter ones, such as a common first sentence, are not.
"""
_ID = re.compile(r"(\d+)-[0-9a-f]{16}")


def plain_tokens(tokens: np.ndarray, special: Sequence[int]) -> np.ndarray:
    """The tokens of a text without special ones, int64 (n,)."""
    return tokens[~np.isin(tokens, np.array(special, np.int64))].astype("<i8")


def text_id(tokens: np.ndarray) -> str:
    """Length and hash of a text's plain tokens: '212-0f3a...'."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
    return f"{len(tokens)}-{digest}"


def document_ids(split: Split, stream: np.ndarray, special: Sequence[int]) -> list[str]:
    """Ids of the documents that positions `stream` of a split's tokens lie in, sorted.

    A document's tokens after its last target, which no evaluation scores, are left out.
    """
    found = set()
    for index in np.unique(np.searchsorted(split.documents, stream, side="right") - 1):
        part = slice(split.documents[index], split.documents[index + 1])
        tokens = split.tokens[part].astype(np.int64)
        targets = (split.mask[part] > 0) & ~np.isin(tokens, np.array(special, np.int64))
        if targets.any():
            end = int(targets.nonzero()[0][-1]) + 1
            found.add(text_id(plain_tokens(tokens[:end], special)))
    return sorted(found)


class KnownTexts:
    """A set of texts by their ids."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = {id for id in ids if _ID.fullmatch(id)}
        self._lengths = sorted({int(id.partition("-")[0]) for id in self._ids})

    def __bool__(self) -> bool:
        return bool(self._ids)

    def holds(self, tokens: np.ndarray) -> bool:
        """Whether plain tokens are one of the texts, or begin with a long one."""
        digest, done = hashlib.blake2b(digest_size=8), 0
        for length in self._lengths:
            if length > len(tokens):
                return False
            digest.update(tokens[done:length].tobytes())
            done = length
            counts = length == len(tokens) or length >= LONG
            if counts and f"{length}-{digest.hexdigest()}" in self._ids:
                return True
        return False
