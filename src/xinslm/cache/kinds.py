"""The kinds of cache entries: sparse distributions over single tokens, and buckets of tokens.

    kind = kind_of(Cache("cache"))
    sources = kind.sources(Path("data/tokenizer"))   # {"train": ..., "validation": ...}

Everything that depends on the kind is a method here; other modules ask the object.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from xinslm.alignment.byte_prefix import byte_order
from xinslm.cache.bucket_entries import bucket_dtype, decode_buckets
from xinslm.cache.entries import ENTRIES, FP16_FLOOR, decode, tail_masses
from xinslm.cache.entry_files import Layout, SparseLayout
from xinslm.cache.folder import Cache, CacheSplit, Decode
from xinslm.data.packing import Batch
from xinslm.errors import UsageError
from xinslm.losses.config import LossConfig
from xinslm.losses.targets import MixedTargets, Targets
from xinslm.tokenizer.load import load_tokenizer


class CachedTargets:
    """Teacher targets from a cache, looked up by stream position: rows may be shuffled freely."""

    def __init__(self, split: CacheSplit) -> None:
        self.split = split

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> Targets:
        """Look up the positions `chosen`, indices into the flattened (rows * row_length) batch."""
        return self.split.targets(batch.stream.ravel()[chosen]).to(device)


class MixedCaches:
    """Teacher targets from several caches of one dataset, with a weight each."""

    def __init__(self, sources: Sequence[CachedTargets], weights: Sequence[float]) -> None:
        self.splits, self.weights = [source.split for source in sources], weights

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> Targets:
        """Look up the positions `chosen`, indices into the flattened (rows * row_length) batch."""
        positions = batch.stream.ravel()[chosen]
        parts = [split.targets(positions) for split in self.splits]
        return MixedTargets.of(parts, self.weights).to(device)


class EntryKind(ABC):
    """Layout of a cache's entries, and how they are read."""

    def __init__(self, cache: Cache, layout: Layout) -> None:
        self.cache, self.format, self.layout = cache, cache.format, layout

    @abstractmethod
    def decoder(self, tokenizer: Path) -> Decode:
        """What converts entries to targets, for a student with this tokenizer folder."""

    @abstractmethod
    def check_loss(self, loss: LossConfig) -> None:
        """Raise UsageError if the entries lack what the loss's temperature needs."""

    @abstractmethod
    def tail_masses(self, entries: np.ndarray) -> np.ndarray:
        """Mass outside the top k of each entry, (N,), from the entries' fixed parts."""

    def splits(self, decode: Decode | None = None) -> dict[str, CacheSplit]:
        """Splits that have entries; `decode` is needed for their targets."""
        self.cache.check()
        return {
            name: CacheSplit(self.cache.folder, shards, self.layout, decode)
            for name, shards in self.cache.manifest["shards"].items()
            if shards
        }

    def sources(self, tokenizer: Path) -> dict[str, CachedTargets]:
        """Target source of each split that has entries."""
        opened = self.splits(self.decoder(tokenizer))
        return {name: CachedTargets(split) for name, split in opened.items()}


class SparseEntries(EntryKind):
    """Top k, tail mass and tail samples over single tokens (see `entries`)."""

    def decoder(self, tokenizer: Path) -> Decode:
        """Token ids are the dataset's, so the tokenizer is not needed."""
        return partial(decode, fmt=self.format)

    def check_loss(self, loss: LossConfig) -> None:
        """Mode full needs the normaliser at the loss's temperature."""
        stored = self.format.temperature
        if loss.temperature_mode == "full" and loss.temperature not in (1.0, stored):
            raise UsageError(
                f"loss.temperature is {loss.temperature} in mode full, but cache "
                f"{self.cache.folder} stores the normaliser for {stored}: use that, mode "
                f"decoupled, or `xinslm cache --temperature {loss.temperature}` (a merged cache "
                "has only the one for 1)"
            )

    def tail_masses(self, entries: np.ndarray) -> np.ndarray:
        """Mass outside the top k of each entry, (N,)."""
        return tail_masses(entries)


class BucketEntries(EntryKind):
    """Masses of buckets of tokens (see `bucket_entries`)."""

    def decoder(self, tokenizer: Path) -> Decode:
        """Buckets are ranges in the byte order of the tokenizer's vocabulary."""
        order = torch.from_numpy(byte_order(load_tokenizer(tokenizer)))
        return partial(decode_buckets, order=order)

    def check_loss(self, loss: LossConfig) -> None:
        """The mass of a bucket is known at temperature 1 only."""
        if loss.temperature != 1:
            raise UsageError(
                f"loss.temperature is {loss.temperature}, but cache {self.cache.folder} holds "
                "masses of buckets of tokens, which have no temperature: set it to 1"
            )

    def tail_masses(self, entries: np.ndarray) -> np.ndarray:
        """Zeros: the rest of the vocabulary is a bucket like the others."""
        return np.zeros(len(entries))


def kind_of(cache: Cache) -> EntryKind:
    """The kind of a cache's entries."""
    fmt = cache.format
    if cache.over_tokens:
        return SparseEntries(cache, SparseLayout(fmt))
    return BucketEntries(cache, Layout(ENTRIES, bucket_dtype(fmt.vocab_size, fmt.top_k)))


def known_log_labels(entries: np.ndarray) -> np.ndarray:
    """Log p of the labels of valid entries, float64, without those where it is not known."""
    log_label: np.ndarray = entries["log_label"].astype(np.float64)
    return log_label[log_label > FP16_FLOOR]
