"""The objective of `pretrain`, `distill` and `onpolicy`: packed rows of fixed shape, the student's
forward pass, the fused loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.data.dataset import Dataset
from xinslm.data.packing import Batch, PackedDataset
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import HeadOptions, LossMetrics, fused_loss
from xinslm.losses.memory import HeadMemory
from xinslm.model.operations import training_operations
from xinslm.model.transformer import Transformer
from xinslm.train.config import PretrainConfig, TrainingConfig
from xinslm.train.interfaces import AuxiliaryLoss, Metrics, Operations, TargetSource
from xinslm.train.loop import Trainer
from xinslm.train.row_sampler import RowSampler, Source


@dataclass(frozen=True)
class PackedMicroBatch:
    """Packed rows of one source, its targets and its loss."""

    source: Source
    loss: LossConfig
    batch: Batch
    chosen: np.ndarray
    """Target positions in the flattened batch, int64."""

    @property
    def num_targets(self) -> int:
        """Target tokens in it."""
        return len(self.chosen)

    @property
    def has_teacher(self) -> bool:
        """Whether its loss has a distillation term."""
        return self.source.targets is not None


class PackedObjective:
    """Packed rows from the sources of a plan, and the fused loss of a `Transformer` on them."""

    def __init__(
        self,
        model: Transformer,
        config: TrainingConfig,
        plan: RowSampler,
        device: torch.device,
        validation: tuple[PackedDataset, TargetSource | None] | None = None,
        auxiliary: AuxiliaryLoss | None = None,
        compile: bool = False,
    ) -> None:
        """`validation` rows are scored with the loss of the plan's first source."""
        assert auxiliary is None or len(plan.sources) == 1, "hidden states belong to one dataset"
        self.model, self.config, self.plan, self.device = model, config, plan, device
        self.auxiliary = auxiliary
        self._validation = validation
        self._head = HeadOptions(memory=None if model.gradient_checkpointing else HeadMemory())
        self._forward: Callable[..., Any] = torch.compile(model.hidden) if compile else model.hidden

    @property
    def operations(self) -> Operations:
        """Work of a step of full rows."""
        config, dtype = self.config, self.model.compute_dtype or self.model.head_weight.dtype
        of_token = training_operations(self.model.config, config.max_seq_length)
        per_step = config.batch_size * config.max_seq_length * of_token
        return Operations(per_step, dtype, self.device.type)

    @property
    def has_held_out(self) -> bool:
        """Whether there is data to validate on."""
        return self._validation is not None

    def micro_batches(self, step: int) -> list[PackedMicroBatch]:
        """The rows of a step, in micro-batches; each source's are apart."""
        micro = self.config.micro_batch_size or self.config.batch_size
        parts = self.plan.of_step(step)
        batches = [
            [
                part.source.rows.batch(part.indices[at : at + micro])
                for at in range(0, len(part.indices), micro)
            ]
            for part in parts
        ]
        chosen = [[_targets(batch) for batch in of_part] for of_part in batches]
        counts = [sum(map(len, of_part)) for of_part in chosen]
        losses = self.plan.losses(step, parts, counts)
        return [
            PackedMicroBatch(part.source, loss, batch, where)
            for part, loss, of_part, places in zip(parts, losses, batches, chosen, strict=True)
            for batch, where in zip(of_part, places, strict=True)
        ]

    def held_out(self) -> Iterator[PackedMicroBatch]:
        """The first `max_eval_samples` rows of the validation split (0: all)."""
        if self._validation is None:
            return
        rows, targets = self._validation
        source = Source(rows, targets, self.plan.sources[0].loss)
        limit = self.config.max_eval_samples
        last = min(len(rows), limit) if limit else len(rows)
        micro = self.config.micro_batch_size or self.config.batch_size
        for at in range(0, last, micro):
            batch = rows.batch(np.arange(at, min(at + micro, last)))
            yield PackedMicroBatch(source, source.loss, batch, _targets(batch))

    def loss(
        self, micro: PackedMicroBatch, normaliser: float, step: int | None
    ) -> tuple[Tensor, LossMetrics, Metrics]:
        """Fused loss of a micro-batch; losses on hidden states are added if `step` is given."""
        auxiliary = self.auxiliary if step is not None else None
        depths = () if auxiliary is None or step is None else auxiliary.depths(step)
        batch = micro.batch
        hidden = self._forward(
            self._tensor(batch.input_ids),
            self._tensor(batch.positions),
            self._tensor(batch.segments),
            layers=depths,
        )
        extra: Tensor | float = 0.0
        terms: Metrics = {}
        if depths and auxiliary is not None and step is not None:
            hidden, layers = hidden
            extra, terms = auxiliary.loss(layers, batch, micro.chosen, step, normaliser)
        where = self._tensor(micro.chosen)
        hidden = hidden.reshape(-1, hidden.shape[-1])[where]
        labels = self._tensor(batch.labels.ravel())[where]
        source = micro.source.targets
        targets = None if source is None else source.targets(batch, micro.chosen, self.device)
        loss, metrics = fused_loss(
            hidden,
            self.model.head_weight,
            labels,
            targets,
            micro.loss,
            normaliser,
            self._head,
        )
        return loss + extra, metrics, terms

    def documents(self, micro: PackedMicroBatch) -> np.ndarray:
        """Documents of a micro-batch."""
        stream = micro.batch.stream
        offsets = micro.source.rows.split.documents
        found: np.ndarray = np.searchsorted(offsets, stream[stream >= 0], side="right") - 1
        return found

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def packed_trainer(
    model: Transformer,
    config: PretrainConfig,
    source: Source,
    total_steps: int,
    validation: tuple[PackedDataset, TargetSource | None] | None = None,
    auxiliary: AuxiliaryLoss | None = None,
) -> Trainer:
    """A trainer of `model`, on its device, with the rows of one source."""
    plan = RowSampler([source], config.batch_size, total_steps, config.seed)
    device = next(model.parameters()).device
    objective = PackedObjective(model, config, plan, device, validation, auxiliary, config.compile)
    return Trainer(
        objective, config, total_steps, optimizer_in_backward=config.optimizer_in_backward
    )


def validation_data(dataset: Dataset, max_seq_length: int) -> PackedDataset | None:
    """The validation split as packed rows; None if it is absent or empty."""
    if "validation" not in dataset.manifest["splits"]:
        return None
    rows = PackedDataset(dataset.split("validation"), max_seq_length)
    return rows if len(rows) else None


def _targets(batch: Batch) -> np.ndarray:
    return np.flatnonzero(batch.labels.ravel() >= 0)
