"""What the training loop needs of others: an objective, teacher targets, auxiliary losses.

The loop knows neither caches nor teachers. `distill` implements `TargetSource` and
`AuxiliaryLoss`; `packed.py` and `lora.py` implement `Objective`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from xinslm.data.packing import Batch
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import LossMetrics
from xinslm.losses.targets import Targets
from xinslm.model.config import ModelConfig

Metrics = dict[str, tuple[float, int]]
"""Name of an auxiliary loss -> its unweighted sum over positions, and the number of positions."""


class TargetSource(Protocol):
    """Gives the teacher targets of chosen positions of a batch."""

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> Targets:
        """Targets of positions `chosen`, indices into the flattened (rows * row_length) batch."""
        ...


class AuxiliaryLoss(Protocol):
    """Losses on hidden states, with trained projections and an optimizer of their own."""

    matrices: list[nn.Parameter]

    def depths(self, step: int) -> tuple[int, ...]:
        """Blocks of the student, from 1, whose outputs `loss` needs at `step`."""
        ...

    def loss(
        self,
        layer_outputs: list[Tensor],
        batch: Batch,
        chosen: np.ndarray,
        step: int,
        normaliser: float,
    ) -> tuple[Tensor | float, Metrics]:
        """Weighted loss of a micro-batch, and its terms without weights."""
        ...

    def zero_grad(self) -> None:
        """Drop the gradients of the last step."""
        ...

    def step(self, rate: float, max_grad_norm: float) -> None:
        """Update the projections at learning rate `rate`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Projections and their optimizer's moments, for a checkpoint."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave; KeyError or RuntimeError if it does not fit."""
        ...


@dataclass(frozen=True)
class Supervision:
    """What a run learns from: a loss, teacher targets and auxiliary losses; text alone if none."""

    loss: LossConfig = field(default_factory=lambda: LossConfig(alpha=1.0, beta=0.0))
    train: TargetSource | None = None
    validation: TargetSource | None = None
    make_auxiliary_loss: Callable[[ModelConfig, int, torch.device], AuxiliaryLoss] | None = None
    """(student, total steps, device) -> losses on hidden states."""
    inputs: tuple[tuple[str, str], ...] = ()
    """Role and fingerprint of each input, for the run folder."""
    warnings: tuple[str, ...] = ()


class MicroBatch(Protocol):
    """Sequences of one forward pass."""

    @property
    def num_targets(self) -> int:
        """Target tokens in it."""
        ...

    @property
    def has_teacher(self) -> bool:
        """Whether its loss has a distillation term."""
        ...


@dataclass(frozen=True)
class Operations:
    """What a step costs, to compare with what the device can do."""

    per_step: float
    """Floating-point operations of a forward and a backward pass over all positions."""
    dtype: torch.dtype
    """Type of the matrix products."""
    device: str


class Objective(Protocol):
    """A model and the data it is trained on: gives micro-batches and their loss."""

    @property
    def model(self) -> nn.Module:
        """The model; its parameters that require gradients are trained."""
        ...

    @property
    def auxiliary(self) -> AuxiliaryLoss | None:
        """Losses on hidden states, if any."""
        ...

    @property
    def operations(self) -> Operations | None:
        """Work of a step; None if it is not counted."""
        ...

    @property
    def has_held_out(self) -> bool:
        """Whether there is data to validate on."""
        ...

    def micro_batches(self, step: int) -> list[Any]:
        """Micro-batches of optimizer step `step` (from 0), a function of the seed and the step."""
        ...

    def held_out(self) -> Iterator[Any]:
        """Micro-batches to validate on."""
        ...

    def loss(
        self, micro: Any, normaliser: float, step: int | None
    ) -> tuple[Tensor, LossMetrics, Metrics]:
        """Loss of a micro-batch divided by `normaliser`; auxiliary losses if `step` is given."""
        ...

    def documents(self, micro: Any) -> np.ndarray:
        """Training documents of a micro-batch, for error messages."""
        ...
