"""Projected hidden states: a teacher's hidden states in a few bytes per position, for a student of
any width.

A projected hidden state is G RMSnorm(h): the state without its length, times a fixed Gaussian
matrix G (width, hidden size) with E||Gx||^2 = ||x||^2 (Johnson and Lindenstrauss 1984). G depends
only on its two sizes, so live and cached projected hidden states agree up to the 8-bit rounding.
The array `hidden_states` of a cache holds, for each position and depth, `width` int8 codes and one
fp16 scale: 66 bytes at width 64. Scale 0 means that no teacher token ends where this position's
token does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xinslm.cache.entry_files import Layout
from xinslm.cache.folder import HIDDEN_STATES, Cache, CacheSplit
from xinslm.data.packing import Batch
from xinslm.errors import UsageError, XinslmError

WIDTH = 64
"""Width of a live teacher's projected hidden states, and of a cache's by default."""
LARGEST_CODE = 127


def depth_at(share: float, num_layers: int) -> int:
    """Block, counted from 1, at relative depth `share` of a model.

    Student depth l meets teacher depth ceil(l L_t / L_s): both are `depth_at(l / L_s, ...)`, and 1
    is the last of both.
    """
    return min(max(math.ceil(share * num_layers - 1e-6), 1), num_layers)


@dataclass(frozen=True)
class HiddenStateFormat:
    """Of which depths a teacher's projected hidden states are, and their layout."""

    depths: tuple[int, ...]
    """Blocks of the teacher, counted from 1, rising."""
    num_layers: int
    """Blocks it has."""
    hidden_size: int
    """Width of its hidden states."""
    width: int = WIDTH
    """Numbers in a projected hidden state."""
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
    ) -> "HiddenStateFormat":
        """Format for relative depths; those that fall on one block are kept once."""
        depths = sorted({depth_at(share, num_layers) for share in shares})
        return cls(tuple(depths), num_layers, hidden_size, width, alone)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Packed entry of one position."""
        depths = len(self.depths)
        return np.dtype([("scales", "<f2", (depths,)), ("codes", "i1", (depths, self.width))])

    def column(self, share: float, source: str) -> int:
        """Column of relative depth `share`; UsageError if there is none."""
        depth = depth_at(share, self.num_layers)
        if depth not in self.depths:
            have = ", ".join(f"{d / self.num_layers:.3g}" for d in self.depths)
            raise UsageError(
                f"{source} has no projected hidden states of relative depth {share} (block "
                f"{depth} of {self.num_layers}), only of {have}. Choose among those, or make the "
                f"cache with --hidden-state-depths {share}"
            )
        return self.depths.index(depth)


@lru_cache(maxsize=4)
def projection_matrix(width: int, hidden_size: int) -> Tensor:
    """G, (width, hidden_size) float32: independent N(0, 1/width), the same on every machine."""
    drawn = np.random.default_rng((width, hidden_size)).standard_normal((width, hidden_size))
    return torch.from_numpy((drawn / math.sqrt(width)).astype(np.float32))


def rms_normalise(x: Tensor) -> Tensor:
    """Rows (..., size) scaled to a mean square of 1."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)


def project_states(states: Sequence[Tensor], fmt: HiddenStateFormat) -> Tensor:
    """Hidden states (N, hidden_size) per depth -> projected (depths, N, width) float32."""
    matrix = projection_matrix(fmt.width, fmt.hidden_size).to(states[0].device)
    return torch.stack([rms_normalise(x.float()) @ matrix.t() for x in states])


def encode_projected_states(projected_states: Tensor, fmt: HiddenStateFormat) -> np.ndarray:
    """(depths, N, width) -> N entries; FloatingPointError if a number is not finite."""
    if not bool(torch.isfinite(projected_states).all()):
        raise FloatingPointError("hidden states are not finite")
    x = projected_states.transpose(0, 1).float().cpu()  # (N, depths, width)
    scales = (x.abs().amax(dim=2) / LARGEST_CODE).half()
    entries = np.zeros(x.shape[0], dtype=fmt.dtype)
    entries["scales"] = scales.numpy()
    codes = (x / scales.float().clamp_min(1e-30)[:, :, None]).round()
    entries["codes"] = codes.clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8).numpy()
    return entries


def decode_projected_states(entries: np.ndarray) -> tuple[Tensor, Tensor]:
    """N entries -> projected hidden states (depths, N, width) float32, validity (N,) bool."""
    scales = torch.from_numpy(entries["scales"].astype(np.float32))
    codes = torch.from_numpy(entries["codes"].astype(np.float32))
    return (codes * scales[:, :, None]).transpose(0, 1), (scales > 0).all(dim=1)


class HiddenStateSource(Protocol):
    """Gives the teacher's projected hidden states at chosen positions of a batch."""

    format: HiddenStateFormat
    name: str
    """For messages: 'cache x', 'teacher y'."""

    def projected_states(
        self, batch: Batch, chosen: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """States (depths, N, width) float32 and validity (N,) of the flat positions `chosen`."""
        ...


class CachedHiddenStates(CacheSplit):
    """The array `hidden_states` of one split of a cache, shards mapped into memory."""

    def __init__(self, cache: Cache, split: str) -> None:
        """UsageError if the cache has no hidden states, XinslmError if they are damaged."""
        facts = cache.manifest.get(HIDDEN_STATES)
        if facts is None:
            raise UsageError(
                f"cache {cache.folder} has no projected hidden states, which hidden.weight and "
                "contrast.weight need. Make it with `xinslm cache --hidden-state-depths 0.5 1.0`, "
                "or give a live --teacher in its place"
            )
        cache.check()
        self.name = f"cache {cache.folder}"
        try:
            self.format = HiddenStateFormat(**{**facts, "depths": tuple(facts["depths"])})
        except (TypeError, KeyError):
            raise XinslmError(
                f"{cache.folder}: 'hidden_states' in its manifest is damaged; make the cache again"
            ) from None
        layout = Layout(HIDDEN_STATES, self.format.dtype)
        super().__init__(cache.folder, cache.manifest["shards"][split], layout)

    def projected_states(
        self, batch: Batch, chosen: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Look up `chosen` positions."""
        entries = self.entries(batch.stream.ravel()[chosen])
        found, valid = decode_projected_states(entries)
        return found.to(device), valid.to(device)

    def count(self) -> int:
        """How many positions have projected hidden states."""
        return sum(int((shard["scales"] > 0).all(axis=1).sum()) for shard in self.fixed_parts)


class HiddenStateWriter:
    """Writes projected hidden states into the array of a shard."""

    def __init__(self, fmt: HiddenStateFormat, entries: np.ndarray) -> None:
        self.format, self.entries = fmt, entries

    def put(self, states: Sequence[Tensor], rows: np.ndarray, places: np.ndarray) -> None:
        """Project row `rows[i]` of the states (tokens, hidden_size) for place `places[i]`."""
        index = torch.from_numpy(rows).to(states[0].device)
        projected = project_states([x[index] for x in states], self.format)
        self.entries[places] = encode_projected_states(projected, self.format)
