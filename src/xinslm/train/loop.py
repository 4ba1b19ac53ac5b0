"""The training loop, with or without a teacher.

An `Objective` gives micro-batches and their loss. The loss is divided by the target tokens of the
optimizer step, however it is split into micro-batches. The batches of a step follow from the seed
and the step, so a continued run repeats the uninterrupted one bit for bit on one machine's CPU
with the same number of threads. Ctrl-C ends the run after the current step, with a checkpoint.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from xinslm.errors import Interrupted, XinslmError
from xinslm.heap import HeapKeeper
from xinslm.model.param_dtype import forget_copies
from xinslm.train.checkpoint import TrainingState
from xinslm.train.config import TrainingConfig
from xinslm.train.interfaces import Metrics, Objective
from xinslm.train.optimizer_in_backward import BackwardSteps, clip
from xinslm.train.optimizers import make_optimizer


@dataclass(frozen=True)
class Step:
    """Metrics of one optimizer step, averages per target token in nats."""

    step: int
    tokens: int
    loss: float
    ce: float
    kd: float
    learning_rate: float
    grad_norm: float
    terms: dict[str, float] = field(default_factory=dict)
    """Auxiliary losses by name, without their weights."""


@dataclass(frozen=True)
class Validation:
    """Averages over the validation data, nats per target token."""

    ce: float
    kd: float | None


def learning_rate(
    step: int, total: int, peak: float, warmup_ratio: float, decay_ratio: float
) -> float:
    """Warmup-stable-decay schedule (arXiv:2404.06395): linear warmup, constant, linear decay to 0
    after the last step; `step` counts from 0.
    """
    warmup, decay = warmup_ratio * total, decay_ratio * total
    rising = (step + 1) / warmup if step + 1 < warmup else 1.0
    falling = (total - step) / decay if total - step < decay else 1.0
    return peak * min(rising, falling)


def add_metrics(a: Metrics, b: Metrics) -> Metrics:
    """Add the auxiliary losses of two micro-batches."""
    sums = dict(a)
    for name, (value, positions) in b.items():
        before = sums.get(name, (0.0, 0))
        sums[name] = (before[0] + value, before[1] + positions)
    return sums


class Trainer:
    """An objective and its optimizer: `step` is one optimizer step, `validate` one pass over
    held-out data.
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainingConfig,
        total_steps: int,
        rate: Callable[[int], float] | None = None,
        optimizer_in_backward: bool = False,
    ) -> None:
        """`rate` gives the learning rate of a step, by default the schedule over `total_steps`."""
        self.objective, self.config, self.total_steps = objective, config, total_steps
        self.optimizer = make_optimizer(objective.model, config)
        self._heap = HeapKeeper()
        self.backward = (
            BackwardSteps(self.optimizer, config.max_grad_norm) if optimizer_in_backward else None
        )
        self.rate = rate or (
            lambda step: learning_rate(
                step,
                total_steps,
                config.learning_rate,
                config.warmup_ratio,
                config.decay_ratio,
            )
        )

    def step(self, number: int) -> Step:
        """Take optimizer step `number` (from 0).

        Raises XinslmError if the loss or the gradient is not finite. The weights are unchanged
        then, except with `optimizer_in_backward`, where some may have been updated.
        """
        objective = self.objective
        work = objective.micro_batches(number)
        count = sum(micro.num_targets for micro in work)
        rate = self.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        objective.model.train()
        forget_copies(objective.model)
        self.optimizer.zero_grad(set_to_none=True)
        if objective.auxiliary is not None:
            objective.auxiliary.zero_grad()
        ce = kd = total = 0.0
        terms: Metrics = {}
        for micro in work:
            if micro.num_targets == 0:
                continue
            loss, metrics, of_micro = objective.loss(micro, count, number)
            if not math.isfinite(loss.item()):
                raise XinslmError(self._not_finite(number, "loss", loss.item(), [micro]))
            with self.backward.during() if self.backward is not None else nullcontext():
                loss.backward()
            total, ce, kd = total + loss.item(), ce + metrics.ce, kd + metrics.kd
            terms = add_metrics(terms, of_micro)
        norm = self._update(number, rate, work)
        self._heap.after_step()
        means = {name: value / positions for name, (value, positions) in terms.items()}
        return Step(
            number + 1, count, total, ce / max(count, 1), kd / max(count, 1), rate, norm, means
        )

    def _update(self, number: int, rate: float, work: list[Any]) -> float:
        """Clip and apply the gradients; return their norm before clipping."""
        if self.backward is not None:
            norm, scale = self.backward.norm, 1.0
        else:
            norm, scale = clip(self.objective.model, self.config.max_grad_norm)
        if not math.isfinite(norm):
            raise XinslmError(self._not_finite(number, "gradient", norm, work))
        if self.backward is None:
            self.optimizer.step(scale)
        if self.objective.auxiliary is not None:
            self.objective.auxiliary.step(rate, self.config.max_grad_norm)
        return norm

    def _not_finite(self, number: int, what: str, value: float, work: list[Any]) -> str:
        documents = np.unique(np.concatenate([self.objective.documents(micro) for micro in work]))
        named = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
        return (
            f"the {what} is {value} at step {number + 1}, on training documents {named}. Training "
            "has stopped; the last checkpoint is from before. Try a smaller --learning-rate or a "
            "longer --warmup-ratio"
        )

    @torch.no_grad()
    def validate(self) -> Validation:
        """Score the held-out data."""
        self.objective.model.eval()
        forget_copies(self.objective.model)
        ce = kd = 0.0
        count = 0
        has_teacher = False
        for micro in self.objective.held_out():
            if micro.num_targets:
                _, metrics, _ = self.objective.loss(micro, 1.0, None)
                ce, kd = ce + metrics.ce, kd + metrics.kd
                count += micro.num_targets
                has_teacher |= micro.has_teacher
        return Validation(ce / max(count, 1), kd / max(count, 1) if has_teacher else None)


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


class Recorder(Protocol):
    """Takes the metrics and checkpoints of a run (see `recorder.RunRecorder`)."""

    def step(self, step: Step, state: TrainingState) -> None:
        """After each optimizer step."""
        ...

    def validation(self, result: Validation, state: TrainingState) -> None:
        """After each validation."""
        ...

    def save(self, state: TrainingState, is_best: bool) -> None:
        """Write a checkpoint."""
        ...

    def save_best(self, state: TrainingState) -> None:
        """Write the weights alone, as the best ones."""
        ...


def train(
    trainer: Trainer, state: TrainingState, recorder: Recorder, eval_steps: int | None = None
) -> TrainingState:
    """Run from `state` to the last step and return the final state.

    Validates every `eval_steps` steps and after the last one; without held-out data the last
    checkpoint counts as the best. Raises `Interrupted` after a checkpoint.
    """
    config, validates = trainer.config, trainer.objective.has_held_out
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
            recorder.step(step, state)
            final = state.step == trainer.total_steps
            is_best = False
            if validates and (final or (eval_steps and state.step % eval_steps == 0)):
                result = trainer.validate()
                is_best = state.best_validation is None or result.ce < state.best_validation
                if is_best:
                    state = replace(state, best_validation=result.ce)
                recorder.validation(result, state)
            stop = interrupted() and not final
            if final or stop or state.step % config.save_steps == 0:
                recorder.save(state, is_best or not validates)
            elif is_best:
                recorder.save_best(state)
            if stop:
                raise Interrupted(
                    f"interrupted after step {state.step} of {trainer.total_steps}; the run is "
                    f"saved. The same command{' without --force' if config.force else ''} "
                    "continues it"
                )
    return state
