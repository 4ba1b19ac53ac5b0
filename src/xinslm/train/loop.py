"""The one training loop, with or without a teacher.

Fixed-shape packed rows; the loss is normalised by the target tokens of the whole optimiser step,
however it is split into micro-batches. Which rows a step takes follows from the seed and the step
alone, so a continued run repeats the uninterrupted one bit for bit on one machine's CPU. Ctrl-C
ends after the running step, with a checkpoint.
"""

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.data.packing import Batch, PackedRows
from xinslm.distill.auxiliary import Auxiliary, Figures, add_figures
from xinslm.distill.config import PretrainConfig
from xinslm.distill.target_sources import TargetSource
from xinslm.errors import XinslmError
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import LossFigures, fused_loss
from xinslm.model.transformer import Transformer
from xinslm.train.checkpoint import TrainingState
from xinslm.train.optimizer_in_backward import BackwardSteps, clip
from xinslm.train.optimizers import make_optimizer
from xinslm.train.row_sampler import Part, RowPlan, Source


class Interrupted(XinslmError):
    """The run was stopped by Ctrl-C or a termination signal, after a checkpoint."""


@dataclass(frozen=True)
class Step:
    """Figures of one optimiser step, averages per target token in nats."""

    step: int
    tokens: int
    loss: float
    ce: float
    kd: float
    learning_rate: float
    grad_norm: float
    terms: dict[str, float] = field(default_factory=dict)
    """Losses on hidden states by name, without their weights."""


@dataclass(frozen=True)
class Validation:
    """Averages over the validation rows, nats a target token."""

    ce: float
    kd: float | None


def learning_rate(
    step: int, total: int, peak: float, warmup_fraction: float, decay_fraction: float
) -> float:
    """Warm-up-stable-decay (arXiv:2404.06395): up from 0, flat, down to 0 at the end; `step` counts
    from 0.
    """
    warmup, decay = warmup_fraction * total, decay_fraction * total
    rising = (step + 1) / warmup if step + 1 < warmup else 1.0
    falling = (total - step) / decay if total - step < decay else 1.0
    return peak * min(rising, falling)


def rows_of_step(step: int, batch_size: int, num_rows: int, seed: int) -> np.ndarray:
    """Indices of a step's rows: consecutive places in an endless chain of permutations, one an
    epoch.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, within = places // num_rows, places % num_rows
    return np.array(
        [_order(seed, int(e), num_rows)[i] for e, i in zip(epochs, within, strict=True)]
    )


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


class Trainer:
    """A model, its optimiser and its data; `step` is one optimiser step, `validate` a pass over
    held-out rows.
    """

    def __init__(
        self,
        model: Transformer,
        config: PretrainConfig,
        loss: LossConfig,
        rows: PackedRows,
        total_steps: int,
        source: TargetSource | None,
        device: torch.device,
        auxiliary: Auxiliary | None = None,
        plan: RowPlan | None = None,
    ) -> None:
        """With a `plan` rows come from its sources, and `loss`, `rows`, `source` are for validation
        alone.
        """
        assert plan is None or auxiliary is None, (
            "losses on hidden states know the rows of one dataset"
        )
        assert plan is None or not config.step_in_backward, (
            "each source of rows has a backward pass of its own"
        )
        self.model, self.config, self.loss, self.rows, self.plan = model, config, loss, rows, plan
        self.auxiliary = auxiliary
        self.total_steps, self.source, self.device = total_steps, source, device
        self.optimizer = make_optimizer(model, config)
        self.backward = (
            BackwardSteps(self.optimizer, config.clip_norm) if config.step_in_backward else None
        )
        self.forward: Callable[..., Any] = (
            torch.compile(model.hidden) if config.compile else model.hidden
        )

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast for the forward pass, nothing in float32."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _loss(
        self,
        batch: Batch,
        source: TargetSource | None,
        loss_config: LossConfig,
        normaliser: float,
        chosen: np.ndarray,
        step: int | None = None,
    ) -> tuple[Tensor, LossFigures, Figures]:
        """Loss of a micro-batch; the losses on hidden states have their part where `step` is
        given.
        """
        beside = self.auxiliary if step is not None else None
        taps = () if beside is None or step is None else beside.depths(step)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        with self.precision():
            hidden = self.forward(
                on_device(batch.input_ids),
                on_device(batch.positions),
                on_device(batch.segments),
                taps=taps,
            )
        extra: Tensor | float = 0.0
        terms: Figures = {}
        if taps and beside is not None and step is not None:
            hidden, tapped = hidden
            extra, terms = beside.loss(tapped, batch, chosen, step, normaliser)
        where = on_device(chosen)
        hidden = hidden.reshape(-1, hidden.shape[-1])[where]
        if self.config.dtype == "bfloat16":
            hidden = hidden.bfloat16()
        labels = on_device(batch.labels.ravel())[where]
        targets = source.targets(batch, chosen, self.device) if source is not None else None
        loss, figures = fused_loss(
            hidden, self.model.head_weight, labels, targets, loss_config, normaliser
        )
        return loss + extra, figures, terms

    def step(self, number: int) -> Step:
        """Take optimiser step `number` (from 0). Raises XinslmError if loss or gradient are not
        finite.

        The weights are untouched then, but for `step_in_backward`, where some may have been stepped
        before it showed.
        """
        config = self.config
        work, count = self._work(number)
        rate = self.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        if self.auxiliary is not None:
            self.auxiliary.zero_grad()
        ce = kd = total = 0.0
        beside: Figures = {}
        for source, loss_config, batch, where in work:
            if len(where) == 0:
                continue
            loss, figures, terms = self._loss(
                batch, source.targets, loss_config, count, where, number
            )
            if not math.isfinite(loss.item()):
                raise XinslmError(self._not_finite(number, "loss", loss.item(), [(source, batch)]))
            with self.backward.during() if self.backward is not None else nullcontext():
                loss.backward()
            total, ce, kd = total + loss.item(), ce + figures.ce, kd + figures.kd
            beside = add_figures(beside, terms)
        norm, scale = (
            (self.backward.norm, 1.0)
            if self.backward is not None
            else clip(self.model, config.clip_norm)
        )
        if not math.isfinite(norm):
            raise XinslmError(
                self._not_finite(
                    number, "gradient", norm, [(source, batch) for source, _, batch, _ in work]
                )
            )
        if self.backward is None:
            self.optimizer.step(scale)
        if self.auxiliary is not None:
            self.auxiliary.step(rate, config.clip_norm)
        means = {name: value / positions for name, (value, positions) in beside.items()}
        return Step(
            number + 1, count, total, ce / max(count, 1), kd / max(count, 1), rate, norm, means
        )

    def rate(self, number: int) -> float:
        """Learning rate of step `number`."""
        config = self.config
        return learning_rate(
            number,
            self.total_steps,
            config.learning_rate,
            config.warmup_fraction,
            config.decay_fraction,
        )

    def _work(self, number: int) -> tuple[list[tuple[Source, LossConfig, Batch, np.ndarray]], int]:
        """The micro-batches of a step, each with its source, its loss and its target positions; and
        all targets.
        """
        config = self.config
        if self.plan is None:
            indices = rows_of_step(number, config.batch_size, len(self.rows), config.seed)
            parts = [Part(Source(self.rows, self.source, self.loss), indices)]
        else:
            parts = self.plan.of_step(number)
        micro = config.micro_batch_size or config.batch_size
        batches = [
            [
                part.source.rows.batch(part.indices[at : at + micro])
                for at in range(0, len(part.indices), micro)
            ]
            for part in parts
        ]
        chosen = [
            [np.flatnonzero(batch.labels.ravel() >= 0) for batch in of_part] for of_part in batches
        ]
        counts = [sum(len(c) for c in of_part) for of_part in chosen]
        losses = [self.loss] if self.plan is None else self.plan.losses(number, parts, counts)
        work = [
            (part.source, loss, batch, where)
            for part, loss, batches_of, chosen_of in zip(
                parts, losses, batches, chosen, strict=True
            )
            for batch, where in zip(batches_of, chosen_of, strict=True)
        ]
        return work, sum(counts)

    def _not_finite(
        self, number: int, what: str, value: float, taken: list[tuple[Source, Batch]]
    ) -> str:
        documents = np.unique(
            np.concatenate(
                [
                    np.searchsorted(
                        source.rows.split.documents, batch.stream[batch.stream >= 0], side="right"
                    )
                    - 1
                    for source, batch in taken
                ]
            )
        )
        named = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
        return (
            f"the {what} is {value} at step {number + 1}, on training documents {named}. Training "
            "has stopped; the "
            "last checkpoint is from before. Try a smaller --learning-rate or a longer "
            "--warmup-fraction"
        )

    @torch.no_grad()
    def validate(self, rows: PackedRows, source: TargetSource | None, limit: int) -> Validation:
        """Score the first `limit` rows (0: all)."""
        self.model.eval()
        micro = self.config.micro_batch_size or self.config.batch_size
        last = min(len(rows), limit) if limit else len(rows)
        ce = kd = 0.0
        count = 0
        for at in range(0, last, micro):
            batch = rows.batch(np.arange(at, min(at + micro, last)))
            chosen = np.flatnonzero(batch.labels.ravel() >= 0)
            if len(chosen):
                _, figures, _ = self._loss(batch, source, self.loss, 1.0, chosen)
                ce, kd, count = ce + figures.ce, kd + figures.kd, count + len(chosen)
        return Validation(ce / max(count, 1), kd / max(count, 1) if source is not None else None)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C or a termination signal came; a second Ctrl-C stops
    at once.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    trainer: Trainer,
    state: TrainingState,
    validation_rows: PackedRows | None,
    validation_source: TargetSource | None,
    on_step: Callable[[Step, TrainingState], None],
    on_validation: Callable[[Validation, TrainingState], None],
    save: Callable[[TrainingState, bool], None],
    save_best: Callable[[TrainingState], None],
) -> TrainingState:
    """Run from `state` to the last step, validating and saving on the way; return the final
    state.
    """
    config = trainer.config
    with deferred_interrupt() as interrupted:
        while state.step < trainer.total_steps:
            began = time.monotonic()
            step = trainer.step(state.step)
            state = replace(
                state,
                step=step.step,
                tokens=state.tokens + step.tokens,
                seconds=state.seconds + time.monotonic() - began,
                grad_norm=step.grad_norm,
            )
            on_step(step, state)
            final = state.step == trainer.total_steps
            is_best = False
            if validation_rows is not None and (final or state.step % config.validate_every == 0):
                result = trainer.validate(
                    validation_rows, validation_source, config.validation_rows
                )
                is_best = state.best_validation is None or result.ce < state.best_validation
                if is_best:
                    state = replace(state, best_validation=result.ce)
                on_validation(result, state)
            stop = interrupted() and not final
            if final or stop or state.step % config.save_every == 0:
                save(state, is_best or validation_rows is None)
            elif is_best:
                save_best(state)
            if stop:
                raise Interrupted(
                    f"interrupted after step {state.step} of {trainer.total_steps}; the run is "
                    "saved. "
                    f"The same command{' without --force' if config.force else ''} continues it"
                )
    return state
