"""Configuration of `demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from xinslm.ranges import POSITIVE, SEED, Range, Settings, range_errors

_RANGES = {
    "megabytes": POSITIVE,
    "vocab_size": Range(1),
    "teacher_steps": Range(1),
    "student_steps": Range(1),
    "seed": SEED,
}


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Run the whole pipeline on built-in data."""

    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo-run")
    """Folder for everything the demo makes."""
    megabytes: float = 2.0
    """Megabytes of text to generate; more text and more steps make better models."""
    vocab_size: int = 1024
    """Vocabulary of the tokenizer."""
    teacher_steps: int = 300
    """Optimizer steps of the teacher."""
    student_steps: int = 300
    """Optimizer steps of each student."""
    seed: int = 0
    """Seed of the text, the weights and the sampling."""
    force: bool = False
    """Replace what is in the output folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return range_errors(self, _RANGES)
