"""Where a training batch's teacher distributions come from: a cache, or a live teacher that reads the same rows."""

from typing import Protocol

import numpy as np
import torch

from xinslm.data.packing import Batch
from xinslm.distill.cache import CacheSplit
from xinslm.distill.losses import DenseTargets, Targets
from xinslm.teachers.huggingface import HuggingFaceTeacher, batches_by_length

BATCH_TOKENS = 8192
"""Tokens of one forward pass of a live teacher."""


class TargetSource(Protocol):
    """Gives the teacher's word on chosen positions of a batch."""

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> Targets:
        """Distributions for the positions `chosen`, indices into the flattened (rows * row_length) batch."""
        ...


class CachedTargets:
    """Records of a cache, found by stream position: any shuffling of rows is harmless."""

    def __init__(self, split: CacheSplit) -> None:
        self.split = split

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> Targets:
        """Look up `chosen` positions."""
        return self.split.targets(batch.stream.ravel()[chosen]).to(device)


class LiveTargets:
    """A teacher in memory: packed rows are taken apart, so that it sees each document alone."""

    def __init__(self, teacher: HuggingFaceTeacher) -> None:
        self.teacher = teacher

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> Targets:
        """Run the teacher on the batch; its head is applied when the loss asks for a chunk."""
        real = batch.segments.ravel() >= 0
        ids, starts = batch.input_ids.ravel()[real], batch.positions.ravel()[real] == 0
        sequences = np.split(np.arange(len(ids)), np.flatnonzero(starts)[1:])
        lengths = np.array([len(sequence) for sequence in sequences])
        order, parts = [], []
        for batch_of in batches_by_length(lengths, BATCH_TOKENS):
            order += [sequences[k] for k in batch_of]
            parts.append(self.teacher.states([ids[sequences[k]] for k in batch_of]))
        states = torch.cat(parts)
        place = np.empty(len(ids), dtype=np.int64)  # where a token's state ended up
        place[np.concatenate(order)] = np.arange(len(ids))
        row_of = np.zeros(len(real), dtype=np.int64)
        row_of[real] = place
        wanted = torch.from_numpy(row_of[chosen]).to(states.device)

        def logits(rows: slice) -> torch.Tensor:
            return self.teacher.logits(states[wanted[rows]]).to(device)

        return DenseTargets(logits)
