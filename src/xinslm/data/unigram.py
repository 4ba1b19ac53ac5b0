"""Unigram entropy of a dataset: the loss of predicting each token by its frequency.

Frequencies are those of the train split's targets plus one for each id (Laplace smoothing), so that
tokens found only in the validation split have a finite loss.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from xinslm.data.dataset import Dataset

_CHUNK = 1 << 22  # tokens read at once


def measure_unigram_nats(
    folder: Path, splits: Iterable[str], dtype: np.dtype, vocab_size: int
) -> dict[str, float]:
    """Return nats per target token of each split of a dataset folder that has targets."""
    counts = {name: _count_targets(folder / name, dtype, vocab_size) for name in splits}
    frequency = counts["train"] + 1.0
    nats = np.log(frequency.sum()) - np.log(frequency)
    return {name: float(c @ nats) / int(c.sum()) for name, c in counts.items() if c.any()}


def unigram_nats(dataset: Dataset, split: str) -> float | None:
    """Return nats per target token, stored by `prepare` or computed now; None without targets."""
    manifest = dataset.manifest
    stored = manifest.get("unigram_nats")
    if stored is None:
        stored = measure_unigram_nats(
            dataset.folder, manifest["splits"], np.dtype(manifest["dtype"]), manifest["vocab_size"]
        )
    return stored.get(split)


def unigram_bits_per_byte(dataset: Dataset, split: str) -> float | None:
    """Return the entropy in bits per UTF-8 byte of text, which is comparable across tokenizers."""
    nats, facts = unigram_nats(dataset, split), dataset.manifest["splits"][split]
    if nats is None or not facts["bytes"]:
        return None
    return float(nats * facts["targets"] / np.log(2) / facts["bytes"])


def _count_targets(folder: Path, dtype: np.dtype, vocab_size: int) -> np.ndarray:
    """Count how often each id is a target; int64, (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    with open(folder / "tokens.bin", "rb") as tokens, open(folder / "mask.bin", "rb") as mask:
        while len(kept := np.fromfile(mask, np.uint8, _CHUNK)):
            read = np.fromfile(tokens, dtype.newbyteorder("<"), len(kept))
            counts += np.bincount(read[kept != 0], minlength=vocab_size)
    return counts
