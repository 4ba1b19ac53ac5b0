"""Configuration of `plan`: the settings of the run it is about, and what to measure that run
against.
"""

from dataclasses import dataclass
from pathlib import Path

from xinslm.distill.config import DistillConfig
from xinslm.ranges import POSITIVE, TAIL_SAMPLE_MASS, Range, range_errors
from xinslm.train.config import PretrainConfig

_PLAN = {
    "memory": POSITIVE,
    "tokens": Range(1),
    "teacher_parameters": POSITIVE,
    "hourly_price": Range(0),
    "top_k": Range(1, 256),
    "tail_sample_mass": TAIL_SAMPLE_MASS,
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig(DistillConfig):
    """Memory, time, storage and cost of `distill` or `pretrain` with the same settings."""

    data_path: Path | None = None  # type: ignore[assignment]
    """Dataset folder, for its vocabulary and size; without one give --vocab-size and --tokens."""
    output_dir: Path = Path("runs/planned")
    """Not written."""
    memory: float | None = None
    """Available memory in GiB: says if the run fits and, if not, which settings would make it."""
    tokens: int | None = None
    """Tokens of the training split, if there is no dataset folder yet."""
    teacher_parameters: float | None = None
    """Parameters of the teacher in billions, if --teacher is no local folder."""
    hourly_price: float | None = None
    """Price of a machine's hour, in any currency, for the cost of each stage."""
    top_k: int | None = None
    """Most likely tokens that a cache keeps per position; 4 by default, 11 without tail samples."""
    tail_sample_mass: float = 0.02
    """Largest part of the distribution that a tail sample of the cache stands for."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = [*PretrainConfig.errors(self), *self.loss.errors(), *range_errors(self, _PLAN)]
        if self.data_path is None and self.tokens is None and self.max_steps is None:
            wrong.append("how much is to be trained on? Give --data-path, --tokens or --max-steps")
        return wrong
