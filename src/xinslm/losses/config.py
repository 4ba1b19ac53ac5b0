"""Configuration of the losses of `distill`."""

from dataclasses import dataclass
from typing import Literal

from xinslm.ranges import POSITIVE, SHARE, Range, Settings, range_errors

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]

_LOSS = {
    "alpha": Range(0),
    "beta": Range(0),
    "temperature": POSITIVE,
    "tail_weight": SHARE,
    "jsd_weight": Range(0, 1, above=True, below=True),
    "skew": Range(0, 1, below=True),
}


@dataclass(frozen=True)
class LossConfig(Settings):
    """(alpha * CE + beta * T^2 * KD) / N, where N is the number of target tokens in the optimizer
    step.
    """

    alpha: float = 0.5
    """Weight of the hard-label cross-entropy."""
    beta: float = 0.5
    """Weight of the divergence from the teacher; positions without teacher targets give it to the
    cross-entropy.
    """
    temperature: float = 1.0
    """T, which softens both distributions; T^2 keeps the scale of the gradient."""
    temperature_mode: Literal["decoupled", "full"] = "decoupled"
    """decoupled: T inside the cached top k only, exact. full: T everywhere; must equal the cache's
    T.
    """
    tail_weight: float | None = None
    """Weight of the tail samples, or of the label if the tail's inside is unknown: 1 is unbiased, 0
    makes the tail one bucket. The default is 1 if tail samples can be used (forward_kl, no T on the
    tail), else 0.
    """
    divergence: Divergence = "forward_kl"
    """Divergence of the student q from the teacher p. forward_kl covers all modes of the teacher;
    reverse_kl and jsd seek its main modes, for answers the student wrote itself; the skewed ones
    mix both distributions before comparing.
    """
    jsd_weight: float = 0.5
    """The teacher's weight in jsd, w KL(p||m) + (1-w) KL(q||m) with m = w p + (1-w) q: near 0 like
    forward_kl, near 1 like reverse_kl."""
    skew: float = 0.1
    """Share of the first distribution in the second, for skew_kl and skew_reverse_kl."""

    @property
    def effective_tail_weight(self) -> float:
        """`tail_weight`, or its default."""
        if self.tail_weight is not None:
            return self.tail_weight
        tempered = self.temperature_mode == "full" and self.temperature != 1
        return 1.0 if self.divergence == "forward_kl" and not tempered else 0.0

    def errors(self) -> list[str]:
        """All errors, a sentence each."""
        wrong = range_errors(self, _LOSS, "loss.")
        if self.alpha == self.beta == 0:
            wrong.append("loss.alpha and loss.beta are both 0: there is no loss to train with")
        tempered, forward = self.temperature != 1, self.divergence == "forward_kl"
        if self.temperature_mode == "full" and tempered and self.tail_weight:
            wrong.append(
                "loss.temperature_mode full has no tail samples at T: set loss.tail_weight to "
                "0, or leave it out"
            )
        if not forward and self.tail_weight:
            wrong.append(
                f"loss.divergence {self.divergence} cannot use tail samples, "
                "only forward_kl is "
                f"linear in them: set loss.tail_weight to 0, or leave it out"
            )
        if not forward and tempered and self.temperature_mode == "decoupled":
            wrong.append(
                "loss.temperature_mode decoupled is the chain rule of forward_kl, and "
                "loss.divergence "
                f"{self.divergence} has none: set loss.temperature_mode to full, or "
                "loss.temperature to 1"
            )
        return wrong
