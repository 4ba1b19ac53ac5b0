"""Settings of the losses on hidden states, which `distill` adds to the loss on logits."""

from dataclasses import dataclass
from typing import Literal

from xinslm.cache.config import DEPTH, depth_errors
from xinslm.ranges import POSITIVE, Range, Settings, range_errors

UNTIL = Range(0, 1, above=True)
_HIDDEN = {"weight": Range(0), "until": UNTIL}
_CONTRAST = {
    "weight": Range(0),
    "temperature": POSITIVE,
    "depth": DEPTH,
    "positions": Range(2, 65_536),
    "until": UNTIL,
}


@dataclass(frozen=True)
class HiddenConfig(Settings):
    """weight * distance between the hidden states of student and teacher, falling linearly to 0."""

    weight: float = 0.0
    """Weight of the term at the first step; 0 is off, 1 a good start."""
    kind: Literal["projector", "cka"] = "projector"
    """projector: relative squared error behind a trained linear map. cka: 1 - linear CKA, which
    needs no map.
    """
    depths: tuple[float, ...] = (0.5, 1.0)
    """Depths to match, as shares of each model's layers: 1 is behind the last block of both."""
    until: float = 0.5
    """Share of the training at which the weight reaches 0."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = [
            *range_errors(self, _HIDDEN, "hidden."),
            *depth_errors(self.depths, "hidden.depths"),
        ]
        if self.weight and not self.depths:
            wrong.append(
                "hidden.depths is empty, but hidden.weight is not 0: give a depth such as 1.0"
            )
        return wrong


@dataclass(frozen=True)
class ContrastConfig(Settings):
    """weight * InfoNCE between hidden states of student and teacher, falling linearly to 0."""

    weight: float = 0.0
    """Weight of the term at the first step; 0 is off, 0.05 a good start."""
    temperature: float = 0.07
    """Divides the cosines."""
    depth: float = 1.0
    """Depth to contrast, as a share of each model's layers."""
    positions: int = 512
    """Positions of a micro-batch to draw, each the others' negative."""
    until: float = 0.5
    """Share of the training at which the weight reaches 0."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return range_errors(self, _CONTRAST, "contrast.")
