"""Teacher targets for N positions, in the forms that the fused head takes.

Sparse distributions come from a cache, dense ones from a teacher in memory. A teacher with another
tokenizer gives buckets: student tokens that begin with the same bytes. Several teachers give a
mixture of the two that can be cached.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_MASS = -12.0
"""Log of a tail mass below which it counts as rounding; real tail masses are at least 1e-5."""


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's next-token distribution for N positions: the top h tokens, the tail mass and up
    to n tail samples.
    """

    top_k_ids: Tensor
    """(N, h) int64, distinct in a row."""
    top_k_log_probs: Tensor
    """(N, h) float32; with `log_tail` they are the logarithm of a distribution."""
    log_tail: Tensor
    """(N,) float32: log of the mass outside the top k."""
    tail_ids: Tensor
    """(N, n) int64: tokens drawn from the teacher's tail; the first `num_samples` count."""
    num_samples: Tensor
    """(N,) int64: tail samples that count, each for an equal part of the tail mass; if 0, the
    inside of the tail is unknown.
    """
    log_z: Tensor
    """(N,) float32: log of sum p^(1/T) over the vocabulary at the cache's temperature."""
    valid_mask: Tensor
    """(N,) bool: whether the position has teacher targets."""

    def __getitem__(self, rows: Any) -> "SparseTargets":
        return SparseTargets(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @property
    def unknown_tail(self) -> Tensor:
        """(N,) bool: whether the tail has mass, but an unknown inside, so the label is used."""
        return self.valid_mask & (self.num_samples == 0) & (self.log_tail > NO_MASS)

    def to(self, device: torch.device | str) -> "SparseTargets":
        """Move all tensors to `device`."""
        return SparseTargets(
            *(getattr(self, name).to(device) for name in self.__dataclass_fields__)
        )


@dataclass(frozen=True)
class DenseTargets:
    """A live teacher: `logits(rows)` gives its (rows, vocabulary) logits for a slice of the N
    positions.

    Columns beyond the student's vocabulary are padding and ignored; missing columns have no mass.
    """

    logits: Callable[[slice], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.logits(rows)


@dataclass(frozen=True)
class BucketTargets:
    """A teacher's next-token distribution over buckets of tokens: ranges of the vocabulary in byte
    order.

    On level 0 they divide the vocabulary, on level j the tokens that begin with the text's first j
    pieces.
    """

    order: Tensor
    """(V,) int64: the token at each index of the byte order."""
    begins: Tensor
    """(N, k) int64: first index of each bucket. Two ranges of a row are disjoint or nested, never
    equal.
    """
    ends: Tensor
    """(N, k) int64: the index after its last; equals `begins` if there is no bucket."""
    probs: Tensor
    """(N, k) float32: probability of each bucket within its level's set, without nested buckets of
    the same level; the remainder is the set's other tokens.
    """
    levels: Tensor
    """(N, k) int64."""
    onward: Tensor
    """(N, k) bool: whether the bucket is the next level's set; at most one per level."""
    valid_mask: Tensor
    """(N,) bool: whether the position has teacher targets."""

    def __getitem__(self, rows: Any) -> "BucketTargets":
        return BucketTargets(
            self.order, *(getattr(self, n)[rows] for n in self.__dataclass_fields__ if n != "order")
        )

    def to(self, device: torch.device | str) -> "BucketTargets":
        """Move all tensors to `device`."""
        return BucketTargets(
            *(getattr(self, name).to(device) for name in self.__dataclass_fields__)
        )


@dataclass(frozen=True)
class MixedTargets:
    """Targets of several teachers for the same N positions: KD is the weighted mean of theirs."""

    parts: tuple[SparseTargets | BucketTargets, ...]
    """One for each teacher."""
    weights: Tensor
    """(N, teachers) float32; rows sum to 1. Where a teacher has no targets, the others take its
    weight; where none has, all rows of the parts fall back to the hard label.
    """

    @classmethod
    def of(
        cls, parts: Sequence[SparseTargets | BucketTargets], weights: Sequence[float]
    ) -> "MixedTargets":
        """Mix parts by one weight each, of which only ratios count. ValueError for other weights
        than one number of at least 0 for each part, one of them above 0.
        """
        if len(weights) != len(parts) or not (min(weights) >= 0 and 0 < sum(weights) < torch.inf):
            raise ValueError(f"weights {tuple(weights)} for the targets of {len(parts)} teachers")
        shares = torch.tensor(weights, dtype=torch.float64, device=parts[0].valid_mask.device)
        general = shares / shares.max()
        own = torch.stack([part.valid_mask for part in parts], dim=1) * general
        there = own.sum(dim=1, keepdim=True) > 0
        own = torch.where(there, own, general)
        return cls(tuple(parts), (own / own.sum(dim=1, keepdim=True)).float())

    def __getitem__(self, rows: Any) -> "MixedTargets":
        return MixedTargets(tuple(part[rows] for part in self.parts), self.weights[rows])

    def to(self, device: torch.device | str) -> "MixedTargets":
        """Move all tensors to `device`."""
        parts = tuple(part.to(device) for part in self.parts)
        return MixedTargets(parts, self.weights.to(device))


Targets = SparseTargets | DenseTargets | BucketTargets | MixedTargets
