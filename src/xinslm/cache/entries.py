"""The sparse teacher cache: one entry for each position of the dataset's token stream.

Entry i describes the teacher's distribution of token i+1: the h most likely tokens (top k) with
8-bit codes of -log p, the mass of the rest (the tail), tail samples, the log-normaliser at one
temperature, and log p of the label. Code c means -log p = 20 (c/255)^2, finest where p is large;
top k and tail are scaled to sum to 1 when read.

A tail of mass m has ceil(m / `tail_sample_mass`) samples, so that none stands for more than
`tail_sample_mass`: of all ways to spread a number of samples over the positions, samples in
proportion to the mass give the sum of the estimates the least variance (Neyman 1934). With h=4 an
entry takes 20 bytes and 2 for each sample, 38 on average where the mean tail is .17 and
`tail_sample_mass` .02. Tail samples come from a counter-based generator, so an entry depends only
on its position and the seed: a cache that was killed and continued equals an uninterrupted one.

    folder/manifest.json, train/00000.bin, train/00000.tail.bin, ..., validation/00000.bin, ...

This module makes entries and decodes them; `entry_files` lays them out in files, `folder` opens
them.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.losses.targets import SparseTargets
from xinslm.topk import blocked_topk

LARGEST_NEGATIVE_LOG = 20.0
ENTRIES = "entries"
"""Name of the array of entries."""
VALID = 1
FP16_FLOOR = -60000.0
BLOCK = 64


@dataclass(frozen=True)
class CacheFormat:
    """Sizes that determine an entry's layout."""

    vocab_size: int
    top_k: int
    tail_sample_mass: float
    """Largest mass that one tail sample stands for; 0: no tail samples."""
    temperature: float

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Entry in memory, with room for the tail samples of the largest tail."""
        number = "<u2" if self.vocab_size <= 1 << 16 else "<u4"
        return np.dtype(
            [
                ("log_tail", "<f2"),
                ("log_z", "<f2"),
                ("log_label", "<f2"),
                ("flags", "u1"),
                ("num_samples", "u1"),
                ("codes", "u1", (self.top_k,)),
                ("ids", number, (self.top_k,)),
                ("tail_ids", number, (self.most_samples,)),
            ]
        )

    @property
    def most_samples(self) -> int:
        """Tail samples of a tail of mass 1."""
        return math.ceil(1 / self.tail_sample_mass) if self.tail_sample_mass else 0


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
    (see `nested`). labels: (N,) int64. positions: (N,) int64, in the stream. The tail samples are
    systematic (one uniform number, evenly spaced points of the tail's distribution function): each
    is distributed as the tail, with less variance than independent samples. A tail of which a part
    is unknown has none. top_k_ids: (N, h) distinct, by default the most likely tokens. Raises
    FloatingPointError if a row is not finite.
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
    uniforms = position_uniforms(positions, seed)
    drawn, counts, known = sample_tail(probs, top_k_ids, uniforms, fmt.tail_sample_mass)

    top_k_probs = probs.gather(1, top_k_ids)
    # tokens of probability 0 get a share of the unknown mass
    share = (unknown / probs.shape[1])[:, None]
    spread = (top_k_probs == 0) & (share > 0)
    top_k_probs = torch.where(spread, share, top_k_probs)
    unknown = unknown - spread.sum(dim=1) * share[:, 0]
    return pack_entries(
        top_k_ids,
        top_k_probs,
        known + unknown,
        drawn,
        torch.where(unknown == 0, counts, 0),
        _log_normaliser(probs, unknown, fmt.temperature),
        probs.gather(1, labels[:, None])[:, 0].log(),
        fmt,
    )


def pack_entries(
    top_k_ids: Tensor,
    top_k_probs: Tensor,
    tail: Tensor,
    tail_ids: Tensor,
    num_samples: Tensor,
    log_z: Tensor,
    log_label: Tensor,
    fmt: CacheFormat,
) -> np.ndarray:
    """Pack N valid positions: top_k_ids and top_k_probs (N, h); tail_ids (N, n), of which the first
    num_samples (N,) count; others (N,).
    """
    entries = np.zeros(len(top_k_ids), dtype=fmt.dtype)
    entries["log_tail"] = _half(tail.log())
    entries["log_z"] = _half(log_z)
    entries["log_label"] = _half(log_label)
    entries["flags"] = VALID
    entries["num_samples"] = num_samples.cpu().numpy()
    negative_log = (-top_k_probs.log()).clamp(0, LARGEST_NEGATIVE_LOG)
    codes = (255 * (negative_log / LARGEST_NEGATIVE_LOG).sqrt()).round()
    entries["codes"] = codes.to(torch.uint8).cpu().numpy()
    entries["ids"] = top_k_ids.cpu().numpy()
    counts = torch.arange(tail_ids.shape[1], device=tail_ids.device) < num_samples[:, None]
    entries["tail_ids"][:, : tail_ids.shape[1]] = torch.where(counts, tail_ids, 0).cpu().numpy()
    return entries


def sample_tail(
    probs: Tensor, top_k_ids: Tensor, uniforms: Tensor, sample_mass: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Systematic samples of each row's tail (tokens outside the top k), and its mass.

    probs: (N, V) float32; top_k_ids: (N, h); uniforms: (N,) float64 in [0, 1). Returns ids (N, n)
    int64, the number of them that count (N,) int64, which is ceil(mass / sample_mass), and the mass
    (N,) float32. The other ids repeat the last ones. Sums over blocks, then inside a block, are
    short enough for float32 to resolve every token.
    """
    count, width = probs.shape[0], -(-probs.shape[1] // BLOCK) * BLOCK
    if not sample_mass:
        top_k_probs = probs.gather(1, top_k_ids)
        mass_alone = probs.scatter_(1, top_k_ids, 0.0).sum(dim=1).float()
        probs.scatter_(1, top_k_ids, top_k_probs)
        return top_k_ids[:, :0], top_k_ids.new_zeros(count), mass_alone
    tail = F.pad(probs, (0, width - probs.shape[1])) if width > probs.shape[1] else probs.clone()
    tail.scatter_(1, top_k_ids, 0.0)
    tail = tail.view(count, -1, BLOCK)
    cumulative = tail.sum(dim=2).double().cumsum(dim=1)
    mass = cumulative[:, -1:].contiguous()
    counts = num_samples(mass[:, 0], sample_mass)
    steps = torch.arange(int(counts.max()) if count else 0, device=probs.device)
    steps = torch.minimum(steps, (counts - 1).clamp_min(0)[:, None])
    targets = (uniforms[:, None] + steps) / counts.clamp_min(1)[:, None] * mass
    block = torch.searchsorted(cumulative, targets, right=True)
    # rounding must not pass the last token with mass
    block = torch.minimum(block, torch.searchsorted(cumulative, mass))
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    # (N, n, BLOCK)
    inside = tail.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).double().cumsum(dim=2)
    place = (inside <= (targets - before)[:, :, None]).sum(dim=2)
    place = torch.minimum(place, (inside < inside[:, :, -1:]).sum(dim=2))
    ids = (block * BLOCK + place).clamp(max=probs.shape[1] - 1)
    return ids, counts, mass[:, 0].float()


def num_samples(mass: Tensor, sample_mass: float) -> Tensor:
    """Tail samples of tails with mass (N,), of which each stands for at most `sample_mass`: (N,)
    int64.
    """
    most = math.ceil(1 / sample_mass)
    needed = mass / sample_mass - 1e-6  # the rounding of a sum of probabilities must not add one
    return needed.ceil().long().clamp(min=0, max=most)


def _log_normaliser(probs: Tensor, unknown: Tensor, temperature: float) -> Tensor:
    """Log of sum p^(1/T); the unknown mass counts as one token."""
    if temperature == 1.0:
        return torch.zeros_like(unknown)
    return ((probs ** (1 / temperature)).sum(dim=1) + unknown ** (1 / temperature)).log()


def _half(x: Tensor) -> np.ndarray:
    return x.clamp(min=FP16_FLOOR).to(torch.float16).cpu().numpy()


def tail_masses(entries: np.ndarray) -> np.ndarray:
    """Mass outside the top k of N entries or of their fixed parts, (N,) float32."""
    result: np.ndarray = np.exp(_log_masses(entries)[1])
    return result


def _log_masses(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log p of the top k (N, h) and of the tail (N,), float32, scaled to sum to 1."""
    log_probs = -LARGEST_NEGATIVE_LOG * (entries["codes"].astype(np.float32) / 255) ** 2
    log_tail = entries["log_tail"].astype(np.float32)
    total = np.log(np.exp(log_probs).sum(axis=1) + np.exp(log_tail))
    return log_probs - total[:, None], log_tail - total


def decode(entries: np.ndarray, fmt: CacheFormat) -> SparseTargets:
    """Convert N entries to tensors for the loss; top k and tail are scaled to sum to 1."""
    log_probs, log_tail = _log_masses(entries)
    counts = entries["num_samples"].astype(np.int64)
    tail_ids = entries["tail_ids"][:, : int(counts.max(initial=0))]
    return SparseTargets(
        top_k_ids=torch.from_numpy(entries["ids"].astype(np.int64)),
        top_k_log_probs=torch.from_numpy(log_probs),
        log_tail=torch.from_numpy(log_tail),
        tail_ids=torch.from_numpy(tail_ids.astype(np.int64)),
        num_samples=torch.from_numpy(counts),
        log_z=torch.from_numpy(entries["log_z"].astype(np.float32)),
        valid_mask=torch.from_numpy((entries["flags"] & VALID) != 0),
    )


def suffix(array: str) -> str:
    """File suffix of an array: `.bin` for the entries, `.hidden_states.bin` for 'hidden_states'."""
    return ".bin" if array == ENTRIES else f".{array}.bin"
