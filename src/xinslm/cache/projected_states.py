"""Sketches: a teacher's hidden states in a few bytes a position, for a student of any width.

A sketch is G RMSnorm(h): the state without its length, times a fixed Gaussian matrix G (width,
hidden size) with E||Gx||^2 = ||x||^2 (Johnson and Lindenstrauss 1984). G follows from its two
sizes, so a live teacher's sketches are the cached ones up to their 8 bits. The plane `sketch` of a
cache holds, for each position and depth, `width` int8 codes and one fp16 scale: 66 bytes at width
64. Scale 0 says that no teacher token ends where this position does.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xinslm.cache.entries import Cache, gather, suffix
from xinslm.data.packing import Batch
from xinslm.errors import UsageError, XinslmError

SKETCH = "sketch"
WIDTH = 64
"""Width of a live teacher's sketches, and of a cache's by default."""
LARGEST_CODE = 127


def depth_at(share: float, num_layers: int) -> int:
    """Block, counted from 1, behind which `share` of a model's layers lie.

    Student depth l meets teacher depth ceil(l L_t / L_s): both are `depth_at(l / L_s, ...)`, and 1
    is the last of both.
    """
    return min(max(math.ceil(share * num_layers - 1e-6), 1), num_layers)


@dataclass(frozen=True)
class SketchFormat:
    """Of which depths a teacher's sketches are, and their layout."""

    depths: tuple[int, ...]
    """Blocks of the teacher, counted from 1, rising."""
    num_layers: int
    """Blocks it has."""
    hidden_size: int
    """Width of its hidden states."""
    width: int = WIDTH
    """Numbers in a sketch."""
    alone: bool = False
    """Whether the teacher gives nothing else: an encoder, which predicts no tokens."""

    @classmethod
    def of(
        cls,
        shares: Sequence[float],
        num_layers: int,
        hidden_size: int,
        width: int = WIDTH,
        alone: bool = False,
    ) -> "SketchFormat":
        """Format for relative depths; those that fall on one block are kept once."""
        return cls(
            tuple(sorted({depth_at(s, num_layers) for s in shares})),
            num_layers,
            hidden_size,
            width,
            alone,
        )

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Packed record of one position."""
        return np.dtype(
            [
                ("scales", "<f2", (len(self.depths),)),
                ("codes", "i1", (len(self.depths), self.width)),
            ]
        )

    def column(self, share: float, source: str) -> int:
        """Which of the sketches is of relative depth `share`; UsageError where none is."""
        depth = depth_at(share, self.num_layers)
        if depth not in self.depths:
            have = ", ".join(f"{d / self.num_layers:.3g}" for d in self.depths)
            raise UsageError(
                f"{source} has no sketches of relative depth {share} (block {depth} of "
                f"{self.num_layers}), only of "
                f"{have}. Choose among those, or make the cache with --sketch-depths {share}"
            )
        return self.depths.index(depth)


@lru_cache(maxsize=4)
def projection(width: int, hidden_size: int) -> Tensor:
    """G, (width, hidden_size) float32: independent N(0, 1/width), the same on every machine."""
    drawn = np.random.default_rng((width, hidden_size)).standard_normal((width, hidden_size))
    return torch.from_numpy((drawn / math.sqrt(width)).astype(np.float32))


def rms_normalise(x: Tensor) -> Tensor:
    """Rows (..., size) scaled to a mean square of 1."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)


def sketch(states: Sequence[Tensor], fmt: SketchFormat) -> Tensor:
    """Hidden states (N, hidden_size) of each depth -> sketches (depths, N, width) float32."""
    matrix = projection(fmt.width, fmt.hidden_size).to(states[0].device)
    return torch.stack([rms_normalise(x.float()) @ matrix.t() for x in states])


def encode_sketches(sketches: Tensor, fmt: SketchFormat) -> np.ndarray:
    """Sketches (depths, N, width) -> N records; no number moves by more than half its scale.

    Raises FloatingPointError where one is not finite.
    """
    if not bool(torch.isfinite(sketches).all()):
        raise FloatingPointError("hidden states are not finite")
    x = sketches.transpose(0, 1).float().cpu()  # (N, depths, width)
    scales = (x.abs().amax(dim=2) / LARGEST_CODE).half()
    records = np.zeros(x.shape[0], dtype=fmt.dtype)
    records["scales"] = scales.numpy()
    codes = (
        (x / scales.float().clamp_min(1e-30)[:, :, None]).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    )
    records["codes"] = codes.to(torch.int8).numpy()
    return records


def decode_sketches(records: np.ndarray) -> tuple[Tensor, Tensor]:
    """N records -> sketches (depths, N, width) float32, and which positions have any, (N,) bool."""
    scales = torch.from_numpy(records["scales"].astype(np.float32))
    codes = torch.from_numpy(records["codes"].astype(np.float32))
    return (codes * scales[:, :, None]).transpose(0, 1), (scales > 0).all(dim=1)


class HiddenSource(Protocol):
    """Gives the teacher's sketches at chosen positions of a batch."""

    format: SketchFormat
    name: str
    """For messages: 'cache x', 'teacher y'."""

    def sketches(
        self, batch: Batch, chosen: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Sketches (depths, N, width) float32 and validity (N,) bool of the N flat positions
        `chosen`.
        """
        ...


class CachedSketches:
    """The plane `sketch` of one split of a cache, shards mapped into memory."""

    def __init__(self, cache: Cache, split: str) -> None:
        """Raise UsageError if the cache has no sketches, XinslmError if their files do not fit its
        manifest.
        """
        facts = cache.manifest.get(SKETCH)
        if facts is None:
            raise UsageError(
                f"cache {cache.folder} has no sketches of hidden states, which hidden.weight and "
                "contrast.weight need. "
                "Make it with `xinslm cache --sketch-depths 0.5 1.0`, or give a live --teacher "
                "in its place"
            )
        cache.check()
        self.name = f"cache {cache.folder}"
        try:
            self.format = SketchFormat(**{**facts, "depths": tuple(facts["depths"])})
        except (TypeError, KeyError):
            raise XinslmError(
                f"{cache.folder}: 'sketch' in its manifest is damaged; make the cache anew"
            ) from None
        shards = cache.manifest["shards"][split]
        self.starts = np.array([shard["start"] for shard in shards], dtype=np.int64)
        self.maps = []
        for shard in shards:
            path = cache.folder / (shard["file"].removesuffix(suffix("records")) + suffix(SKETCH))
            if (
                not path.is_file()
                or path.stat().st_size != shard["positions"] * self.format.dtype.itemsize
            ):
                raise XinslmError(
                    f"{path} is missing or has not {shard['positions']:,} sketches of "
                    f"{self.format.dtype.itemsize} "
                    "bytes, as the manifest says: the cache is damaged. Copy it again or make it "
                    "anew"
                )
            self.maps.append(np.memmap(path, dtype=self.format.dtype, mode="r"))

    def sketches(
        self, batch: Batch, chosen: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Look up `chosen` positions."""
        found, valid = decode_sketches(gather(self.maps, self.starts, batch.stream.ravel()[chosen]))
        return found.to(device), valid.to(device)

    def count(self) -> int:
        """How many positions have sketches."""
        return sum(int((shard["scales"] > 0).all(axis=1).sum()) for shard in self.maps)


class SketchWriter:
    """Collects the sketches of one shard's positions."""

    def __init__(self, fmt: SketchFormat, count: int) -> None:
        self.format, self.records = fmt, np.zeros(count, dtype=fmt.dtype)

    def put(self, states: Sequence[Tensor], rows: np.ndarray, places: np.ndarray) -> None:
        """Sketch row `rows[i]` of each depth's states (tokens, hidden_size) for place `places[i]`
        of the shard.
        """
        index = torch.from_numpy(rows).to(states[0].device)
        self.records[places] = encode_sketches(
            sketch([x[index] for x in states], self.format), self.format
        )


def facts(fmt: SketchFormat) -> dict[str, Any]:
    """What a cache's manifest says of its sketches."""
    return {**asdict(fmt), "depths": list(fmt.depths)}
