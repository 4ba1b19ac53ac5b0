"""Configuration of `demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from xinslm.errors import UsageError
from xinslm.ranges import POSITIVE, SEED, Range, range_errors

_RANGES = {
    "megabytes": POSITIVE,
    "teacher_steps": Range(1),
    "student_steps": Range(1),
    "seed": SEED,
}


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole pipeline on built-in data."""

    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo-run")
    """Folder for everything the demo makes."""
    megabytes: float = 2.0
    """Text to generate; more text and more steps make better models."""
    vocab_size: int = 1024
    """Vocabulary of the tokenizer."""
    teacher_steps: int = 300
    """Optimiser steps of the teacher."""
    student_steps: int = 300
    """Optimiser steps of each student."""
    seed: int = 0
    """Seed of the text, the weights and the sampling."""
    force: bool = False
    """Replace what stands in the output folder."""

    def check(self) -> None:
        """Raise UsageError listing everything that cannot work."""
        if wrong := range_errors(self, _RANGES):
            raise UsageError("\n".join(wrong))

    def __post_init__(self) -> None:
        self.check()
