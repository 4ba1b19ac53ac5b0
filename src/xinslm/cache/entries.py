"""The sparse teacher cache: one fixed-size entry for each position of the dataset's token stream,
memory-mapped.

Entry i describes the teacher's distribution of token i+1: the h most likely tokens (top k) with
8-bit codes of -log p, the mass of the rest (the tail), n tail samples, the log-normaliser at one
temperature, and log p of the label. An entry has 39 bytes with h=4, n=10 and a vocabulary up to
65,536. Code c means -log p = 20 (c/255)^2, finest where p is large; top k and tail are scaled to
sum to 1 when read. Tail samples come from a counter-based generator, so an entry depends only on
its position and the seed: a cache that was killed and continued equals an uninterrupted one.

    folder/manifest.json, train/00000.bin, train/00001.bin, ..., validation/00000.bin
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.files import damaged_files, read_manifest
from xinslm.losses.targets import BucketTargets, SparseTargets
from xinslm.progress import Listener, Progress, ignore
from xinslm.topk import blocked_topk

KIND, VERSION, MADE_BY = "cache", 2, "xinslm cache"
REPAIR = "run the command that made the cache again with --repair: only damaged files are rebuilt"
LARGEST_NEGATIVE_LOG = 20.0
VALID, HAS_TAIL_SAMPLES = 1, 2
FP16_FLOOR = -60000.0
BLOCK = 64
Decode = Callable[[np.ndarray], SparseTargets | BucketTargets]
"""N entries -> targets of N positions."""


@dataclass(frozen=True)
class CacheFormat:
    """Sizes that determine an entry's layout."""

    vocab_size: int
    top_k: int
    tail_samples: int
    temperature: float

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Packed little-endian entry; `high` holds the bits of ids beyond 16."""
        ids = self.top_k + self.tail_samples
        fields: list[Any] = [
            ("log_tail", "<f2"),
            ("log_z", "<f2"),
            ("log_label", "<f2"),
            ("flags", "u1"),
            ("ids", "<u2", (ids,)),
            ("codes", "u1", (self.top_k,)),
        ]
        if self.high_bits:
            fields.append(("high", "u1", (-(-self.high_bits * ids // 8),)))
        return np.dtype(fields)

    @property
    def high_bits(self) -> int:
        """Bits an id needs beyond 16."""
        return max(0, (self.vocab_size - 1).bit_length() - 16)


def position_uniforms(positions: Tensor, seed: int) -> Tensor:
    """A uniform float64 in [0, 1) for each stream position (N,) int64, from splitmix64."""
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        x = positions.cpu().numpy().astype(np.uint64) + np.uint64(seed % 2**32) * golden
        x = (x + np.uint64(1)) * golden
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2.0**53).to(positions.device)


def encode(
    probs: Tensor,
    labels: Tensor,
    positions: Tensor,
    fmt: CacheFormat,
    seed: int,
    top_k_ids: Tensor | None = None,
) -> np.ndarray:
    """Make entries from teacher distributions.

    probs: (N, V) float32, rows summing to at most 1; the missing mass belongs to unknown tokens
    (see `nested`). labels: (N,) int64. positions: (N,) int64, in the stream. The n tail samples are
    systematic (one uniform number, n evenly spaced points of the tail's distribution function):
    each is distributed as the tail, with less variance than independent samples. top_k_ids: (N, h)
    distinct, by default the most likely tokens. Raises FloatingPointError if a row is not finite.
    """
    unknown = 1 - probs.sum(dim=1)
    if not bool(torch.isfinite(unknown).all()):
        row = int((~torch.isfinite(unknown)).nonzero()[0])
        raise FloatingPointError(
            f"the teacher's distribution at position {int(positions[row])} is not finite"
        )
    # Float32 sums near 1 have an error of ~1e-6: below 1e-5 is rounding, not unknown mass.
    unknown = torch.where(unknown < 1e-5, 0.0, unknown)
    if top_k_ids is None:
        top_k_ids = blocked_topk(probs, fmt.top_k)[1]
    steps = torch.arange(fmt.tail_samples, device=probs.device)
    points = position_uniforms(positions, seed)[:, None] + steps
    drawn, known = sample_tail(probs, top_k_ids, points / max(fmt.tail_samples, 1))

    top_k_probs = probs.gather(1, top_k_ids)
    # tokens of probability 0 get a share of the unknown mass
    share = (unknown / probs.shape[1])[:, None]
    spread = (top_k_probs == 0) & (share > 0)
    top_k_probs = torch.where(spread, share, top_k_probs)
    unknown = unknown - spread.sum(dim=1) * share[:, 0]
    return pack_entries(
        torch.cat((top_k_ids, drawn), dim=1),
        top_k_probs,
        known + unknown,
        (unknown == 0) & (known > 0),
        _log_normaliser(probs, unknown, fmt.temperature),
        probs.gather(1, labels[:, None])[:, 0].log(),
        fmt,
    )


def pack_entries(
    ids: Tensor,
    top_k_probs: Tensor,
    tail: Tensor,
    has_tail_samples: Tensor,
    log_z: Tensor,
    log_label: Tensor,
    fmt: CacheFormat,
) -> np.ndarray:
    """Pack N valid positions: ids (N, h + n), top k first; top_k_probs (N, h); others (N,)."""
    entries = np.zeros(len(ids), dtype=fmt.dtype)
    entries["log_tail"] = _half(tail.log())
    entries["log_z"] = _half(log_z)
    entries["log_label"] = _half(log_label)
    entries["flags"] = (VALID + HAS_TAIL_SAMPLES * has_tail_samples.to(torch.uint8)).cpu().numpy()
    negative_log = (-top_k_probs.log()).clamp(0, LARGEST_NEGATIVE_LOG)
    codes = (255 * (negative_log / LARGEST_NEGATIVE_LOG).sqrt()).round()
    entries["codes"] = codes.to(torch.uint8).cpu().numpy()
    numbers = ids.cpu().numpy()
    entries["ids"] = (numbers & 0xFFFF).astype(np.uint16)
    if fmt.high_bits:
        entries["high"] = pack_bits(numbers >> 16, fmt.high_bits)
    return entries


def sample_tail(probs: Tensor, top_k_ids: Tensor, quantiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens at the given quantiles of each row's tail (tokens outside the top k), and its mass.

    probs: (N, V) float32; top_k_ids: (N, h); quantiles: (N, n) float64 in [0, 1). Returns ids (N,
    n) int64 and mass (N,) float32. Sums over blocks, then inside a block, are short enough for
    float32 to resolve every token.
    """
    count, width = probs.shape[0], -(-probs.shape[1] // BLOCK) * BLOCK
    if not quantiles.shape[1]:
        top_k_probs = probs.gather(1, top_k_ids)
        mass_alone = probs.scatter_(1, top_k_ids, 0.0).sum(dim=1).float()
        probs.scatter_(1, top_k_ids, top_k_probs)
        return top_k_ids[:, :0], mass_alone
    tail = F.pad(probs, (0, width - probs.shape[1])) if width > probs.shape[1] else probs.clone()
    tail.scatter_(1, top_k_ids, 0.0)
    tail = tail.view(count, -1, BLOCK)
    cumulative = tail.sum(dim=2).double().cumsum(dim=1)
    mass = cumulative[:, -1:].contiguous()
    targets = quantiles * mass
    block = torch.searchsorted(cumulative, targets, right=True)
    # rounding must not pass the last token with mass
    block = torch.minimum(block, torch.searchsorted(cumulative, mass))
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    # (N, n, BLOCK)
    inside = tail.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).double().cumsum(dim=2)
    place = (inside <= (targets - before)[:, :, None]).sum(dim=2)
    place = torch.minimum(place, (inside < inside[:, :, -1:]).sum(dim=2))
    return (block * BLOCK + place).clamp(max=probs.shape[1] - 1), mass[:, 0].float()


def _log_normaliser(probs: Tensor, unknown: Tensor, temperature: float) -> Tensor:
    """Log of sum p^(1/T); the unknown mass counts as one token."""
    if temperature == 1.0:
        return torch.zeros_like(unknown)
    return ((probs ** (1 / temperature)).sum(dim=1) + unknown ** (1 / temperature)).log()


def _half(x: Tensor) -> np.ndarray:
    return x.clamp(min=FP16_FLOOR).to(torch.float16).cpu().numpy()


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack (N, k) integers below 2^bits into (N, ceil(k*bits/8)) bytes, lowest bits first."""
    planes = (values[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")


def unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Inverse of `pack_bits`: (N, bytes) -> (N, count) int64."""
    planes = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little")
    planes = planes.reshape(len(packed), count, bits)
    return (planes.astype(np.int64) << np.arange(bits)).sum(axis=2)


def decode(entries: np.ndarray, fmt: CacheFormat) -> SparseTargets:
    """Convert N entries to tensors for the loss; top k and tail are scaled to sum to 1."""
    ids = entries["ids"].astype(np.int64)
    if fmt.high_bits:
        ids |= unpack_bits(entries["high"], ids.shape[1], fmt.high_bits) << 16
    log_probs = -LARGEST_NEGATIVE_LOG * (entries["codes"].astype(np.float32) / 255) ** 2
    log_tail = entries["log_tail"].astype(np.float32)
    total = np.log(np.exp(log_probs).sum(axis=1) + np.exp(log_tail))
    flags = entries["flags"]
    return SparseTargets(
        top_k_ids=torch.from_numpy(np.ascontiguousarray(ids[:, : fmt.top_k])),
        top_k_log_probs=torch.from_numpy(log_probs - total[:, None]),
        log_tail=torch.from_numpy(log_tail - total),
        tail_ids=torch.from_numpy(np.ascontiguousarray(ids[:, fmt.top_k :])),
        has_tail_samples=torch.from_numpy((flags & HAS_TAIL_SAMPLES) != 0),
        log_z=torch.from_numpy(entries["log_z"].astype(np.float32)),
        valid_mask=torch.from_numpy((flags & VALID) != 0),
    )


class CacheSplit:
    """Entries of one split, memory-mapped and looked up by stream position."""

    def __init__(
        self,
        folder: Path,
        shards: list[dict[str, Any]],
        dtype: np.dtype[Any],
        decode: Decode | None = None,
    ) -> None:
        """XinslmError if a file does not hold the number of entries that the manifest tells."""
        self.decode = decode
        self.starts = np.array([shard["start"] for shard in shards], dtype=np.int64)
        self.maps = []
        for shard in shards:
            path, size = folder / shard["file"], shard["positions"] * dtype.itemsize
            if not path.is_file() or path.stat().st_size != size:
                raise XinslmError(
                    f"{path} is missing or does not hold {shard['positions']:,} entries of "
                    f"{dtype.itemsize} bytes, as in the manifest: the cache is damaged. Copy it "
                    "or make it again"
                )
            self.maps.append(np.memmap(path, dtype=dtype, mode="r"))

    def __len__(self) -> int:
        return sum(map(len, self.maps))

    def entries(self, positions: np.ndarray) -> np.ndarray:
        """Entries at stream positions (N,) int64."""
        items = np.empty(len(positions), dtype=self.maps[0].dtype)
        shard_of = np.searchsorted(self.starts, positions, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            items[here] = self.maps[shard][positions[here] - self.starts[shard]]
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
        return CacheSplit(self.folder, shards, self.format.dtype, read) if shards else None

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


def suffix(array: str) -> str:
    """File suffix of an array: `.bin` for the entries, `.hidden_states.bin` for 'hidden_states'."""
    return ".bin" if array == "entries" else f".{array}.bin"


PLAN = "unfinished.json"
"""File in an unfinished cache folder: what the cache is made from."""
