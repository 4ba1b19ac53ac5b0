"""The recorder of a run: `metrics.jsonl`, one JSON object per logged step or validation, and the
checkpoints.

A run that continues first drops the lines after its checkpoint, so that the file reads as if it had
never stopped.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from xinslm.files import write_text
from xinslm.machine import OtherLoad
from xinslm.precision import product_rate
from xinslm.progress import Listener, Progress
from xinslm.train.checkpoint import (
    TrainingState,
    delete_unlinked,
    last_checkpoint,
    load_auxiliary_loss,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from xinslm.train.loop import Step, Trainer, Validation

METRICS = "metrics.jsonl"


def cut_metrics(path: Path, step: int) -> None:
    """Drop lines that belong to steps after the checkpoint, and a half-written last one."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    write_text(path, "".join(kept))


def validation_before(run: Path) -> float | None:
    """The validation loss before the first step, if it was measured."""
    for line in (run / METRICS).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values["step"] == 0 and "validation_ce" in values:
            return float(values["validation_ce"])
    return None


class RunRecorder:
    """Writes metrics.jsonl and checkpoints, and tells the listener; a `loop.Recorder`."""

    def __init__(
        self,
        trainer: Trainer,
        start: TrainingState,
        write_model: Callable[[Path], None],
        on_progress: Listener,
        stage: str,
        with_kd: bool,
        keep_best: bool = True,
    ) -> None:
        """`write_model` fills a folder with the model; without `keep_best` the best checkpoint is
        the last one.
        """
        config = trainer.config
        self.trainer, self.run, self.write_model = trainer, config.output_dir, write_model
        self.path, self.total = self.run / METRICS, trainer.total_steps
        self.every = config.logging_steps or max(1, min(10, self.total // 50))
        self.other_load = OtherLoad()
        self.on_progress, self.stage, self.with_kd = on_progress, stage, with_kd
        self.keep_best, self.since = keep_best, start
        self.last_validation: Validation | None = None
        if start.step:
            on_progress(
                Progress(
                    stage,
                    start.step,
                    self.total,
                    "steps",
                    note=f"continuing after step {start.step}",
                )
            )

    def _write(self, values: dict[str, float | None]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def step(self, step: Step, state: TrainingState) -> None:
        """Log every `logging_steps` steps, the first and the last."""
        if step.step % self.every and step.step not in (1, self.total):
            return
        since, self.since = self.since, state
        seconds = state.seconds - since.seconds
        speed = (state.tokens - since.tokens) / max(seconds, 1e-9)
        kd = {"kd": step.kd} if self.with_kd else {}
        self._write(
            {
                "step": step.step,
                "tokens": state.tokens,
                "loss": step.loss,
                "ce": step.ce,
                **kd,
                **step.terms,
                "lr": step.learning_rate,
                "grad_norm": step.grad_norm,
                "tokens_per_second": speed,
                "utilization": self.utilization(state.step - since.step, seconds),
                "seconds": state.seconds,
                "other_load": self.other_load.share(),
            }
        )
        values = {
            "loss": step.loss,
            "ce": step.ce,
            **kd,
            **step.terms,
            "lr": step.learning_rate,
            "tokens/s": speed,
        }
        self.on_progress(Progress(self.stage, step.step, self.total, "steps", values))

    def utilization(self, steps: int, seconds: float) -> float | None:
        """Operations of the model in some steps by those that the device could do in this time
        (MFU, PaLM, arXiv:2204.02311); None if they are not counted.
        """
        work = self.trainer.objective.operations
        if work is None or seconds <= 0:
            return None
        return steps * work.per_step / seconds / product_rate(work.dtype, work.device)

    def validation(self, result: Validation, state: TrainingState) -> None:
        """Log a validation."""
        self.last_validation = result
        kd = {} if result.kd is None else {"validation_kd": result.kd}
        self._write({"step": state.step, "tokens": state.tokens, "validation_ce": result.ce, **kd})
        self.on_progress(
            Progress(
                self.stage, state.step, self.total, "steps", {"validation": result.ce}, note=""
            )
        )

    def save(self, state: TrainingState, is_best: bool) -> None:
        """Write a checkpoint."""
        trainer = self.trainer
        is_best = is_best if self.keep_best else state.step == self.total
        save_checkpoint(
            self.run,
            self.write_model,
            trainer.optimizer,
            state,
            is_best,
            trainer.objective.auxiliary,
        )

    def save_best(self, state: TrainingState) -> None:
        """Write the weights alone, as the best ones."""
        if self.keep_best:
            save_best(self.run, self.write_model, state.step)


def resume(
    trainer: Trainer, weights: Callable[[Path], Iterable[tuple[str, Tensor]]]
) -> TrainingState:
    """Load the newest checkpoint of the run folder into `trainer`, if there is one, and drop the
    metrics after it; `weights` reads a checkpoint's (name, tensor) pairs.
    """
    run = trainer.config.output_dir
    state = TrainingState()
    if (last := last_checkpoint(run)) is not None:
        objective = trainer.objective
        state = load_checkpoint(last, weights(last), objective.model, trainer.optimizer)
        if trainer.backward is not None:
            trainer.backward.previous = state.grad_norm or 0.0
        if objective.auxiliary is not None:
            load_auxiliary_loss(last, objective.auxiliary)
        delete_unlinked(last.parent)
    if (run / METRICS).is_file():
        cut_metrics(run / METRICS, state.step or -1)
    else:
        (run / METRICS).write_bytes(b"")
    return state
