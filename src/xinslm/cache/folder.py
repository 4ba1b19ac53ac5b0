"""A finished cache folder, and its entries looked up by stream position.

cache = Cache("cache")
targets = cache.split("train").targets(positions)
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache.entries import ENTRIES, CacheFormat, decode, suffix
from xinslm.cache.entry_files import Items, Layout, SparseLayout, file_of
from xinslm.errors import UsageError, XinslmError
from xinslm.files import damaged_files, read_manifest
from xinslm.losses.targets import BucketTargets, SparseTargets
from xinslm.progress import Listener, Progress, ignore

KIND, VERSION, MADE_BY = "cache", 3, "xinslm cache"
REPAIR = "run the command that made the cache again with --repair: only damaged files are rebuilt"
HIDDEN_STATES = "hidden_states"
"""Name of the array of projected hidden states."""
PLAN = "unfinished.json"
"""File in an unfinished cache folder: what the cache is made from."""
Decode = Callable[[np.ndarray], SparseTargets | BucketTargets]
"""N entries -> targets of N positions."""


class CacheSplit:
    """Entries of one split, memory-mapped and looked up by stream position."""

    def __init__(
        self,
        folder: Path,
        shards: list[dict[str, Any]],
        layout: Layout,
        decode: Decode | None = None,
    ) -> None:
        """XinslmError if a file does not hold the number of entries that the manifest tells."""
        self.decode, self.layout = decode, layout
        self.starts = np.array([shard["start"] for shard in shards], dtype=np.int64)
        self.shards, self.fixed_parts = [], []
        """Items of each shard, and their fixed parts, memory-mapped."""
        for shard in shards:
            path = folder / shard["file"]
            stem = path.with_name(path.name.removesuffix(suffix(ENTRIES)))
            if not layout.has_fixed_parts(stem, shard["positions"]):
                raise XinslmError(
                    f"{file_of(stem, layout.suffixes[0])} is missing or does not hold "
                    f"{shard['positions']:,} entries of {layout.stored.itemsize} bytes, as in the "
                    "manifest: the cache is damaged. Copy it or make it again"
                )
            self.shards.append(layout.open(stem))
            self.fixed_parts.append(layout.fixed_parts(stem))

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def entries(self, positions: np.ndarray) -> np.ndarray:
        """Entries at stream positions (N,) int64."""
        return self._look_up(self.shards, positions, self.layout.dtype)

    def fixed(self, positions: np.ndarray) -> np.ndarray:
        """The fixed parts of entries at stream positions (N,) int64, without tail samples."""
        return self._look_up(self.fixed_parts, positions, self.layout.stored)

    def _look_up(
        self, shards: Sequence[Items], positions: np.ndarray, dtype: np.dtype[Any]
    ) -> np.ndarray:
        items = np.empty(len(positions), dtype)
        shard_of = np.searchsorted(self.starts, positions, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            items[here] = shards[shard][positions[here] - self.starts[shard]]
        return items

    def targets(self, positions: np.ndarray) -> SparseTargets | BucketTargets:
        """Distributions at stream positions (N,) int64."""
        assert self.decode is not None, "opened for its entries only"
        return self.decode(self.entries(positions))


class Cache:
    """A finished cache folder."""

    def __init__(self, folder: Path, check_hashes: bool = True) -> None:
        """With `check_hashes`, files are verified against the manifest when they are first read."""
        self.folder, self.check_hashes = Path(folder), check_hashes
        if (self.folder / PLAN).is_file():
            raise UsageError(
                f"{folder} is an unfinished cache: run the same `{MADE_BY}` command again to "
                "continue it"
            )
        self.manifest = read_manifest(
            self.folder, KIND, VERSION, MADE_BY, REPAIR, check_hashes=False
        )
        self.format = CacheFormat(**self.manifest["format"])

    def check(self) -> None:
        """Verify the files, unless the cache was opened without checks."""
        if self.check_hashes:
            self.verify()

    def verify(self, on_progress: Listener = ignore) -> None:
        """Raise XinslmError unless every file has the hash in the manifest."""
        total = sum(facts["bytes"] for facts in self.manifest["files"].values())

        def report(done: int) -> None:
            on_progress(Progress("check cache", done / 1e6, total / 1e6, "MB"))

        if damaged := damaged_files(self.folder, self.manifest, report):
            named = ", ".join(str(self.folder / name) for name in damaged[:5])
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            raise XinslmError(
                f"{named}{more}: damaged; the content differs from the manifest's hash. "
                f"Copy it again, or {REPAIR}"
            )

    @property
    def positions(self) -> int:
        """Positions of the stream, covered or not."""
        rows = (row for shards in self.manifest["shards"].values() for row in shards)
        return sum(int(row["positions"]) for row in rows)

    @property
    def entry_bytes(self) -> int:
        """Size of the entries' files."""
        files = self.manifest["files"].items()
        return sum(int(facts["bytes"]) for name, facts in files if HIDDEN_STATES not in name)

    @property
    def over_tokens(self) -> bool:
        """Whether entries describe single tokens; else buckets of tokens (see `kinds`)."""
        return bool(self.manifest.get("alignment", {}).get("kind") != "byte_prefix")

    def split(self, name: str) -> CacheSplit | None:
        """Sparse entries of 'train' or 'validation'; None if the split is empty."""
        self.check()
        if not self.over_tokens:
            raise UsageError(
                f"cache {self.folder} holds masses of buckets of tokens (--alignment "
                "byte_prefix), not distributions over single tokens"
            )
        shards = self.manifest["shards"].get(name)
        read = partial(decode, fmt=self.format)
        return CacheSplit(self.folder, shards, SparseLayout(self.format), read) if shards else None

    def require_dataset(self, fingerprint: str, folder: Path) -> None:
        """Raise UsageError unless the cache was made from the dataset with this fingerprint."""
        ours = self.manifest["inputs"]["dataset"]
        if ours != fingerprint:
            raise UsageError(
                f"cache {self.folder} was made from another dataset than {folder}: from "
                f"{self.manifest['dataset_path']} (fingerprints {ours[:12]} and "
                f"{fingerprint[:12]}). Pass the dataset that was cached, or run `{MADE_BY}` on "
                "this one"
            )

    def require_teacher(self, fingerprint: str, name: str) -> None:
        """Raise UsageError unless the teacher with this fingerprint made the cache."""
        config, ours = self.manifest["config"], self.manifest["inputs"]["teacher"]
        if ours != fingerprint:
            adapter = f" with adapter {config['adapter']}" if config.get("adapter") else ""
            raise UsageError(
                f"cache {self.folder} was made by another teacher, or another revision of it, "
                f"than {name}: by {config['teacher']}{adapter} (fingerprints {ours[:12]} and "
                f"{fingerprint[:12]}). Pass the cache of this teacher, or run `{MADE_BY}` with it"
            )
