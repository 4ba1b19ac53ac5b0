"""Configuration of the losses of `distill`."""

from dataclasses import dataclass
from typing import Literal

from xinslm.ranges import POSITIVE, SHARE, Range, range_errors

_LOSS = {"alpha": Range(0), "beta": Range(0), "temperature": POSITIVE, "tail_weight": SHARE}


@dataclass(frozen=True)
class LossConfig:
    """(alpha * CE + beta * T^2 * KD) / N, N the target tokens of the whole optimiser step."""

    alpha: float = 0.1
    """Weight of the cross-entropy against the text."""
    beta: float = 0.9
    """Weight of the divergence from the teacher."""
    temperature: float = 1.0
    """T, which softens both distributions; T^2 keeps the gradient's size."""
    temperature_mode: Literal["decoupled", "full"] = "decoupled"
    """decoupled: T inside the cached head only, exact. full: T everywhere, the cache's own T required."""
    tail_weight: float = 1.0
    """How much the draws from the teacher's tail count: 1 is unbiased, 0 makes the tail one bucket."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _LOSS, "loss.")
        if self.alpha == self.beta == 0:
            wrong.append("loss.alpha and loss.beta are both 0: there is no loss to train with")
        if self.temperature_mode == "full" and self.temperature != 1 and self.tail_weight:
            wrong.append("loss.temperature_mode full has no draws at T: set loss.tail_weight to 0")
        return wrong
