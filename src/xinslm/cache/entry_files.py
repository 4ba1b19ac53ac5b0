"""How the items of a shard lie in its files, and how they are read back by position.

Items of a fixed size are one file: item i is at i times its size. A sparse entry has a varying
number of tail samples. Its fixed part is in `NAME.bin`; the samples of all entries follow each
other in `NAME.tail.bin`, the lowest 16 bits of each token id, and ids that need more have the rest
in `NAME.tail_high.bin`. An entry's samples begin after those of all entries before it, which are
counted once for every `GROUP` entries when a sample is first read.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xinslm.cache.entries import ENTRIES, CacheFormat, suffix
from xinslm.errors import XinslmError

GROUP = 64
"""Entries whose first sample's place is kept in memory, 8 bytes each."""
READ_AT_ONCE = 1 << 16
"""Entries whose samples are looked up together."""


class Items(Protocol):
    """The items of a shard."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray:
        """Items at places (N,) int64."""
        ...


class Layout:
    """Items of a fixed size in one file."""

    def __init__(self, array: str, dtype: np.dtype[Any]) -> None:
        """`array` names the array in a cache; `dtype` is one position's item in memory."""
        self.array, self.dtype = array, dtype

    @property
    def stored(self) -> np.dtype[Any]:
        """The fixed part of an item in the file."""
        return self.dtype

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files."""
        return (suffix(self.array),)

    def pack(self, items: np.ndarray) -> tuple[np.ndarray, ...]:
        """The files' contents."""
        return (items,)

    def has_fixed_parts(self, stem: Path, count: int) -> bool:
        """Whether a shard has the fixed parts of `count` items."""
        file = file_of(stem, suffix(self.array))
        return file.is_file() and file.stat().st_size == count * self.stored.itemsize

    def is_complete(self, stem: Path, count: int) -> bool:
        """Whether the files of a shard hold `count` items."""
        return self.has_fixed_parts(stem, count)

    def fixed_parts(self, stem: Path) -> np.ndarray:
        """The fixed parts of a shard's items, memory-mapped: (count,)."""
        return np.memmap(file_of(stem, suffix(self.array)), dtype=self.stored, mode="r")

    def open(self, stem: Path) -> Items:
        """The items of a shard whose files are complete."""
        return self.fixed_parts(stem)


class SparseLayout(Layout):
    """Sparse entries: a fixed part, and as many tail samples as each has."""

    def __init__(self, fmt: CacheFormat) -> None:
        super().__init__(ENTRIES, fmt.dtype)
        self.format = fmt
        self.high_bits = max(0, (fmt.vocab_size - 1).bit_length() - 16)
        self.sample_bits = 1 << (self.high_bits - 1).bit_length() if self.high_bits else 0
        """Bits of a sample beyond 16, a power of two."""

    @property
    def stored(self) -> np.dtype[Any]:
        """The fixed part of an entry; `high` holds the bits of ids beyond 16."""
        fields: list[Any] = [
            (name, self.dtype[name])
            for name in ("log_tail", "log_z", "log_label", "flags", "num_samples")
        ]
        fields += [("codes", self.dtype["codes"]), ("ids", "<u2", (self.format.top_k,))]
        if self.high_bits:
            fields.append(("high", "u1", (-(-self.high_bits * self.format.top_k // 8),)))
        return np.dtype(fields)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files."""
        samples = (suffix("tail"),) if self.format.most_samples else ()
        return (*super().suffixes, *samples, *((suffix("tail_high"),) if self._has_high else ()))

    def mean_bytes(self, tail: float) -> float:
        """Bytes of an entry where the mean tail has mass `tail`."""
        mass = self.format.tail_sample_mass
        samples = tail / mass + 0.5 if mass else 0.0
        return self.stored.itemsize + samples * (2 + self.sample_bits / 8)

    @property
    def _has_high(self) -> bool:
        return bool(self.high_bits and self.format.most_samples)

    def pack(self, items: np.ndarray) -> tuple[np.ndarray, ...]:
        """The files' contents: fixed parts, and the samples that count."""
        fixed = np.zeros(len(items), self.stored)
        for name in ("log_tail", "log_z", "log_label", "flags", "num_samples", "codes"):
            fixed[name] = items[name]
        fixed["ids"] = items["ids"] & 0xFFFF
        if self.high_bits:
            fixed["high"] = pack_bits(items["ids"].astype(np.int64) >> 16, self.high_bits)
        if not self.format.most_samples:
            return (fixed,)
        counted = np.arange(self.format.most_samples) < items["num_samples"][:, None]
        samples = items["tail_ids"][counted]
        low = (samples & 0xFFFF).astype("<u2")
        if not self._has_high:
            return fixed, low
        high = pack_bits((samples.astype(np.int64) >> 16)[None], self.sample_bits)[0]
        return fixed, low, high

    def is_complete(self, stem: Path, count: int) -> bool:
        """Whether the files of a shard hold `count` entries and their samples."""
        if not self.has_fixed_parts(stem, count):
            return False
        counts = self.fixed_parts(stem)["num_samples"] if count else np.zeros(0, np.uint8)
        return self.fits(stem, int(counts.sum(dtype=np.int64)))

    def fits(self, stem: Path, samples: int) -> bool:
        """Whether the files of a shard hold this number of samples."""
        sizes = (2 * samples, -(-samples * self.sample_bits // 8))
        files = [file_of(stem, name) for name in self.suffixes[1:]]
        return all(
            file.is_file() and file.stat().st_size == size
            for file, size in zip(files, sizes, strict=False)
        )

    def open(self, stem: Path) -> Items:
        """The entries of a shard; XinslmError when they are read if the files do not fit."""
        return SparseItems(self, stem)


class SparseItems:
    """Sparse entries of a shard, put together from its files."""

    def __init__(self, layout: SparseLayout, stem: Path) -> None:
        self.layout, self.stem, self.fixed = layout, stem, layout.fixed_parts(stem)

    def __len__(self) -> int:
        return len(self.fixed)

    @cached_property
    def _before(self) -> np.ndarray:
        """Samples before each group of entries: (groups,) int64."""
        counts = np.ascontiguousarray(self.fixed["num_samples"])
        firsts = np.arange(0, len(counts), GROUP)
        sums = np.add.reduceat(counts, firsts, dtype=np.int64) if len(counts) else firsts
        allowed = self.layout.format.most_samples
        if counts.max(initial=0) > allowed or not self.layout.fits(self.stem, int(sums.sum())):
            raise XinslmError(
                f"{file_of(self.stem, suffix(ENTRIES))}: its entries count {sums.sum():,} tail "
                f"samples, at most {counts.max(initial=0)} of {allowed}, and the file of samples "
                "does not fit: the cache is damaged. Copy it or make it again"
            )
        before: np.ndarray = np.cumsum(sums) - sums
        return before

    @cached_property
    def _low(self) -> np.ndarray:
        """Lowest 16 bits of all samples."""
        return _mapped(file_of(self.stem, suffix("tail")), "<u2")

    @cached_property
    def _high(self) -> np.ndarray:
        """Other bits of all samples, packed."""
        return _mapped(file_of(self.stem, suffix("tail_high")), "u1")

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Entries at places (N,) int64; XinslmError if the counts of samples do not fit."""
        entries = np.zeros(len(places), self.layout.dtype)
        for at in range(0, len(places), READ_AT_ONCE):
            part = slice(at, at + READ_AT_ONCE)
            self._fill(places[part], entries[part])
        return entries

    def _fill(self, places: np.ndarray, entries: np.ndarray) -> None:
        layout, fixed = self.layout, self.fixed[places]
        for name in ("log_tail", "log_z", "log_label", "flags", "num_samples", "codes", "ids"):
            entries[name] = fixed[name]
        if layout.high_bits:
            high = unpack_bits(fixed["high"], layout.format.top_k, layout.high_bits)
            entries["ids"] |= (high << 16).astype(entries["ids"].dtype)
        before = self._before
        most = int(fixed["num_samples"].max(initial=0))
        if not most:
            return
        group, inside = np.divmod(places, GROUP)
        steps = np.arange(GROUP)
        near = self.fixed["num_samples"][np.minimum(group[:, None] * GROUP + steps, len(self) - 1)]
        ahead = np.where(steps < inside[:, None], near, 0).sum(axis=1, dtype=np.int64)
        counted = np.arange(most) < fixed["num_samples"][:, None]
        index = (before[group] + ahead)[:, None] + np.arange(most)
        samples = np.zeros(index.shape, entries["tail_ids"].dtype)
        samples[counted] = self._low[index[counted]]
        if layout.sample_bits:
            bit = index[counted] * layout.sample_bits
            high = self._high[bit >> 3] >> (bit & 7).astype(np.uint8)
            high = high & np.uint8((1 << layout.sample_bits) - 1)
            samples[counted] |= high.astype(samples.dtype) << 16
        entries["tail_ids"][:, :most] = samples


def layouts(arrays: Mapping[str, np.dtype[Any]], fmt: CacheFormat) -> list[Layout]:
    """The layout of each array of a cache; entries of type `fmt.dtype` are sparse."""
    return [
        SparseLayout(fmt) if dtype == fmt.dtype else Layout(name, dtype)
        for name, dtype in arrays.items()
    ]


def file_of(stem: Path, ending: str) -> Path:
    """The file of a shard with the given suffix."""
    return stem.with_name(stem.name + ending)


def _mapped(file: Path, dtype: str) -> np.ndarray:
    """A file as an array, memory-mapped; empty if there is none or nothing in it."""
    if not file.is_file() or not file.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(file, dtype=dtype, mode="r")


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack (N, k) integers below 2^bits into (N, ceil(k*bits/8)) bytes, lowest bits first."""
    planes = (values[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")


def unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Inverse of `pack_bits`: (N, bytes) -> (N, count) int64."""
    planes = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little")
    planes = planes.reshape(len(packed), count, bits)
    return (planes.astype(np.int64) << np.arange(bits)).sum(axis=2)
