"""The line-by-line record of a run, `metrics.jsonl`: one JSON object a logged step or validation.

A run that continues drops the lines behind its checkpoint first, so that the file reads as if it
had never stopped.
"""

import json
import os
from pathlib import Path

from xinslm.distill.config import PretrainConfig
from xinslm.files import write_text
from xinslm.progress import Listener, Progress
from xinslm.train.checkpoint import TrainingState
from xinslm.train.loop import Step, Validation

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


class RunLog:
    """Writes metrics.jsonl and tells the listener."""

    def __init__(
        self,
        config: PretrainConfig,
        total: int,
        start: TrainingState,
        on_progress: Listener,
        stage: str,
        with_kd: bool,
    ) -> None:
        self.path, self.every, self.total = config.output_dir / METRICS, config.log_every, total
        self.on_progress, self.stage, self.with_kd = on_progress, stage, with_kd
        self.since = start
        self.last_validation: Validation | None = None
        if start.step:
            on_progress(
                Progress(
                    stage, start.step, total, "steps", note=f"continuing after step {start.step}"
                )
            )

    def _write(self, values: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def step(self, step: Step, state: TrainingState) -> None:
        """Log every `log_every` steps, the first and the last."""
        if step.step % self.every and step.step not in (1, self.total):
            return
        seconds = state.seconds - self.since.seconds
        speed = (state.tokens - self.since.tokens) / max(seconds, 1e-9)
        self.since = state
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
                "seconds": state.seconds,
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
