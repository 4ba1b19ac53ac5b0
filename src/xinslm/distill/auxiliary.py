"""Losses on hidden states in the training loop: schedules, trained projections and their optimizer.

    weight(step) * sum over the step's positions / (target positions of the step)

For the projector's error this is exact however a step is split into micro-batches. CKA and InfoNCE
compare the positions of one micro-batch with each other; each counts by its share of the step's
target positions. Positions at which no teacher token ends are left out. The projections are not
part of the model: a checkpoint keeps them in a file of their own, and their own AdamW trains them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from xinslm.cache.folder import Cache
from xinslm.cache.projected_states import (
    CachedHiddenStates,
    HiddenStateSource,
    depth_at,
    rms_normalise,
)
from xinslm.data.dataset import Dataset
from xinslm.data.packing import Batch
from xinslm.distill.config import DistillConfig
from xinslm.distill.contrast import draw_places, info_nce
from xinslm.distill.matching import linear_cka, projected_error
from xinslm.files import manifest_fingerprint
from xinslm.model.config import ModelConfig
from xinslm.train.interfaces import Metrics


@dataclass(frozen=True)
class Pair:
    """A depth of the student, which of the source's projected hidden states it meets, and which map
    leads from one to the other.
    """

    depth: int
    column: int
    matrix: int | None


class HiddenStateLoss:
    """Losses on the hidden states of a student; an `AuxiliaryLoss`."""

    def __init__(
        self,
        config: DistillConfig,
        source: HiddenStateSource,
        student: ModelConfig,
        total_steps: int,
        device: torch.device,
    ) -> None:
        hidden, contrast = config.hidden, config.contrast
        num_layers, hidden_size = student.num_hidden_layers, student.hidden_size
        self.hidden, self.contrast, self.source, self.seed = hidden, contrast, source, config.seed
        self.total_steps = total_steps
        shares = hidden.depths if hidden.weight else ()
        mapped = hidden.kind == "projector"
        self.pairs = [
            Pair(
                depth_at(share, num_layers),
                source.format.column(share, source.name),
                n if mapped else None,
            )
            for n, share in enumerate(shares)
        ]
        self.contrasted = None
        if contrast.weight:
            column = source.format.column(contrast.depth, source.name)
            self.contrasted = Pair(
                depth_at(contrast.depth, num_layers), column, len(shares) if mapped else 0
            )
        generator = torch.Generator().manual_seed(config.seed)
        count = (len(shares) if mapped else 0) + (self.contrasted is not None)
        shape = (count, source.format.width, hidden_size)
        drawn = torch.randn(shape, generator=generator) / math.sqrt(hidden_size)
        self.matrices = [nn.Parameter(matrix.to(device)) for matrix in drawn]
        self.optimizer = (
            torch.optim.AdamW(
                self.matrices,
                lr=0.0,
                betas=(config.adam_beta1, config.adam_beta2),
                weight_decay=0.0,
            )
            if self.matrices
            else None
        )

    def parameters(self) -> list[nn.Parameter]:
        """The projections, (width, hidden_size) each."""
        return self.matrices

    def weights(self, step: int) -> tuple[float, float]:
        """Weights of matching and contrast at `step`, from 0."""
        done = step / self.total_steps
        left = (max(0.0, 1 - done / config.until) for config in (self.hidden, self.contrast))
        return self.hidden.weight * next(left), self.contrast.weight * next(left)

    def depths(self, step: int) -> tuple[int, ...]:
        """Blocks of the student whose outputs `loss` needs at `step`, from 1; none when all weights
        are 0.
        """
        gamma, delta = self.weights(step)
        needed = {pair.depth for pair in self.pairs} if gamma else set()
        if delta and self.contrasted is not None:
            needed.add(self.contrasted.depth)
        return tuple(sorted(needed))

    def loss(
        self,
        layer_outputs: list[Tensor],
        batch: Batch,
        chosen: np.ndarray,
        step: int,
        normaliser: float,
    ) -> tuple[Tensor | float, Metrics]:
        """Weighted sum of the terms for one micro-batch, a scalar with a graph, and the metrics
        without weights.

        layer_outputs: outputs (B, T, d) of the blocks that `depths(step)` names. chosen: flat
        target positions of the batch. normaliser: target positions of the whole step.
        """
        depths = self.depths(step)
        if not depths:
            return 0.0, {}
        device = layer_outputs[0].device
        projected_states, valid = self.source.projected_states(batch, chosen, device)
        kept = valid.nonzero()[:, 0]
        if len(kept) < 2:
            return 0.0, {}
        where = torch.from_numpy(chosen).to(device)[kept]
        states = {
            depth: rms_normalise(output.reshape(-1, output.shape[-1])[where].float())
            for depth, output in zip(depths, layer_outputs, strict=True)
        }
        projected_states = projected_states[:, kept]
        gamma, delta = self.weights(step)
        total: Tensor | float = 0.0
        metrics: Metrics = {}
        share = len(chosen) / normaliser
        if gamma and self.pairs:
            error, per_position = self._match(states, projected_states)
            total = total + error * (gamma / normaliser if per_position else gamma * share)
            metrics["hidden"] = (error.item() * (1 if per_position else len(kept)), len(kept))
        if delta and self.contrasted is not None:
            labels = torch.from_numpy(batch.labels.ravel()[chosen]).to(device)[kept]
            places = self._draw(len(kept), batch, step)
            nce = self._contrast(
                self.contrasted,
                states,
                projected_states,
                labels,
                torch.from_numpy(places).to(device),
            )
            total = total + nce * (delta * share)
            metrics["contrast"] = (nce.item() * len(places), len(places))
        return total, metrics

    def _match(self, states: dict[int, Tensor], projected_states: Tensor) -> tuple[Tensor, bool]:
        """Mean over depths of the sum of errors, or of 1 - CKA; and whether it is a sum over
        positions.
        """
        terms = []
        for pair in self.pairs:
            mine, theirs = states[pair.depth], projected_states[pair.column]
            if pair.matrix is None:
                terms.append(1 - linear_cka(mine, theirs))
            else:
                terms.append(projected_error(mine, self.matrices[pair.matrix], theirs).sum())
        return torch.stack(terms).mean(), self.hidden.kind == "projector"

    def _draw(self, count: int, batch: Batch, step: int) -> np.ndarray:
        first = int(batch.stream.max()) + 1  # tells the micro-batches of a step apart
        return draw_places(np.arange(count), self.contrast.positions, (self.seed, step, first))

    def _contrast(
        self,
        pair: Pair,
        states: dict[int, Tensor],
        projected_states: Tensor,
        labels: Tensor,
        places: Tensor,
    ) -> Tensor:
        assert pair.matrix is not None, "contrast always has a map"
        anchors = states[pair.depth][places] @ self.matrices[pair.matrix].t()
        return info_nce(
            anchors,
            projected_states[pair.column][places],
            labels[places],
            self.contrast.temperature,
        )

    def zero_grad(self) -> None:
        """Drop the gradients of the last step."""
        for matrix in self.matrices:
            matrix.grad = None

    def step(self, rate: float, max_grad_norm: float) -> None:
        """Update the projections at learning rate `rate`; their gradient is clipped apart from the
        model's.
        """
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.matrices, max_grad_norm or math.inf)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Projections and their moments, for a checkpoint."""
        tensors = {}
        for number, matrix in enumerate(self.matrices):
            tensors[f"matrix.{number}"] = matrix.detach().cpu().contiguous()
            moments = self.optimizer.state.get(matrix, {}) if self.optimizer is not None else {}
            for key, value in moments.items():
                tensors[f"{key}.{number}"] = value.detach().cpu().contiguous()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave; KeyError or RuntimeError if it does not fit."""
        for number, matrix in enumerate(self.matrices):
            matrix.data.copy_(tensors[f"matrix.{number}"])
            keys = [
                name.partition(".")[0]
                for name in tensors
                if name.endswith(f".{number}") and "matrix" not in name
            ]
            if keys and self.optimizer is not None:
                self.optimizer.state[matrix] = {
                    key: tensors[f"{key}.{number}"].to("cpu" if key == "step" else matrix.device)
                    for key in keys
                }


def auxiliary_maker(
    config: DistillConfig, source: HiddenStateSource | None
) -> Callable[[ModelConfig, int, torch.device], HiddenStateLoss] | None:
    """Makes the losses on hidden states of a run from (student, total steps, device)."""
    if source is None:
        return None

    def make(student: ModelConfig, total_steps: int, device: torch.device) -> HiddenStateLoss:
        return HiddenStateLoss(config, source, student, total_steps, device)

    return make


def find_hidden_source(
    config: DistillConfig, dataset: Dataset, teacher: HiddenStateSource | Cache
) -> tuple[HiddenStateSource | None, tuple[tuple[str, str], ...]]:
    """Where the teacher's hidden states come from, and the fingerprint of a cache that is given for
    them alone; None if no loss needs any.

    `teacher` is the live teacher or its cache; `config.hidden_states` takes precedence.
    """
    if not config.hidden_depths():
        return None, ()
    if config.hidden_states is None:
        return CachedHiddenStates(teacher, "train") if isinstance(teacher, Cache) else teacher, ()
    cache = Cache(config.hidden_states)
    cache.require_dataset(dataset.fingerprint, dataset.folder)
    return CachedHiddenStates(cache, "train"), (
        ("hidden_states", manifest_fingerprint(cache.folder)),
    )
