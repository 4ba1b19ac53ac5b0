"""Sequences of a dataset as padded batches, for models without attention inside packed rows.

A step takes `batch_size` sequences and splits them into micro-batches of similar length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xinslm.data.dataset import Dataset, Split
from xinslm.data.packing import IGNORE, sequences
from xinslm.errors import XinslmError
from xinslm.teachers.local import batches_by_length
from xinslm.train.config import TrainingConfig
from xinslm.train.row_sampler import indices_of_step

MICRO_TOKENS = 4096
"""Tokens of a micro-batch, pads included, if `micro_batch_size` is not given."""


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded sequences."""

    ids: Tensor
    """(rows, longest) int64; 0 on pads."""
    labels: Tensor
    """(rows, longest) int64: the next token, -100 if it is no target."""
    documents: np.ndarray
    """(rows,) int64: document of each sequence."""
    has_teacher = False

    @property
    def num_targets(self) -> int:
        """Target tokens in it."""
        return int((self.labels != IGNORE).sum())


class PaddedSequences:
    """A dataset's splits cut into sequences of at most `max_seq_length` tokens; those without a
    target are left out.
    """

    def __init__(self, dataset: Dataset, config: TrainingConfig) -> None:
        self.config = config
        self._train = _Sequences(dataset.split("train"), config.max_seq_length)
        if not len(self._train.starts):
            raise XinslmError("the dataset has no token to learn: every document's mask is empty")
        self._validation = None
        if "validation" in dataset.manifest["splits"]:
            validation = _Sequences(dataset.split("validation"), config.max_seq_length)
            self._validation = validation if len(validation.starts) else None

    @property
    def has_held_out(self) -> bool:
        """Whether there is data to validate on."""
        return self._validation is not None

    def steps(self, num_epochs: float) -> int:
        """Optimizer steps of some passes over the train split."""
        return max(1, round(num_epochs * len(self._train.starts) / self.config.batch_size))

    def micro_batches(self, step: int) -> list[PaddedBatch]:
        """The sequences of a step, longest first."""
        count, config = len(self._train.starts), self.config
        chosen = indices_of_step(step, config.batch_size, count, config.seed)
        return list(self._batches(self._train, chosen))

    def held_out(self) -> Iterator[PaddedBatch]:
        """`max_eval_samples` sequences drawn from the validation split (0: all)."""
        if self._validation is not None:
            order = np.random.default_rng(0).permutation(len(self._validation.starts))
            limit = self.config.max_eval_samples or len(order)
            yield from self._batches(self._validation, order[:limit])

    def _batches(self, of: "_Sequences", chosen: np.ndarray) -> Iterator[PaddedBatch]:
        lengths, micro = of.lengths[chosen], self.config.micro_batch_size
        if micro is None:
            parts = list(batches_by_length(lengths, MICRO_TOKENS))
        else:
            order = np.argsort(-lengths, kind="stable")
            parts = [order[at : at + micro] for at in range(0, len(order), micro)]
        return (of.batch(chosen[part]) for part in parts)


class _Sequences:
    def __init__(self, split: Split, max_seq_length: int) -> None:
        self.split = split
        starts, lengths = sequences(split.documents, max_seq_length)
        targets = np.concatenate([[0], np.cumsum(split.mask, dtype=np.int64)])
        has_target = targets[starts + lengths + 1] > targets[starts + 1]
        self.starts, self.lengths = starts[has_target], lengths[has_target]

    def batch(self, chosen: np.ndarray) -> PaddedBatch:
        """Make the batch of some sequences."""
        width = int(self.lengths[chosen].max())
        ids = np.zeros((len(chosen), width), dtype=np.int64)
        labels = np.full((len(chosen), width), IGNORE, dtype=np.int64)
        for row, k in enumerate(chosen):
            start, length = int(self.starts[k]), int(self.lengths[k])
            after = slice(start + 1, start + length + 1)
            following = self.split.tokens[after].astype(np.int64)
            ids[row, :length] = self.split.tokens[start : start + length]
            labels[row, :length] = np.where(self.split.mask[after] != 0, following, IGNORE)
        documents = np.searchsorted(self.split.documents, self.starts[chosen], side="right") - 1
        return PaddedBatch(torch.from_numpy(ids), torch.from_numpy(labels), documents)
