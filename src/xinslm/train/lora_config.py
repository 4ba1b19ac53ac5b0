"""Configuration of `adapt`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xinslm.errors import UsageError
from xinslm.ranges import POSITIVE, SEED, SHARE, Range, range_errors

_ADAPT = {
    "rank": Range(1, 1024),
    "alpha": POSITIVE,
    "dropout": Range(0, 1, below=True),
    "learning_rate": POSITIVE,
    "num_epochs": POSITIVE,
    "max_steps": Range(1),
    "warmup_fraction": SHARE,
    "clip_norm": Range(0),
    "max_seq_length": Range(2, 1_000_000),
    "batch_tokens": Range(1),
    "validation_tokens": Range(0),
    "save_every": Range(1),
    "seed": SEED,
}


@dataclass(frozen=True)
class AdaptConfig:
    """Teach a teacher the text at hand with a LoRA adapter, before it is cached."""

    teacher: Annotated[str, tyro.conf.Positional]
    """Teacher: a model folder or a Hub name; any Hugging Face causal language model."""
    data_path: Path
    """Dataset folder made by `xinslm prepare` with the teacher's own tokenizer."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Adapter folder to write, in peft's layout; the same command continues a killed one."""
    rank: int = 16
    """Rank of the update of each matrix."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapted matrix' inputs left out of its update in training."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the matrices to adapt, or all-linear: all of the blocks."""
    learning_rate: float = 2e-4
    """Peak rate; rises from 0, then falls linearly to 0."""
    num_epochs: float = 1.0
    """Passes over the training split."""
    max_steps: int | None = None
    """Optimiser steps, instead of epochs."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the rate rises."""
    clip_norm: float = 1.0
    """Longest gradient, as its L2 norm; 0 for no limit."""
    max_seq_length: int = 512
    """Longest context in tokens; use the student's."""
    batch_tokens: int = 4096
    """Tokens of an optimiser step, pads included."""
    validation_tokens: int = 50_000
    """Validation tokens to measure before and after, about; 0 for all."""
    save_every: int = 50
    """Steps between saved states: what a kill costs at most."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The teacher's number type; the adapter is float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes cuda, then mps, then cpu."""
    checkpointing: bool = False
    """Compute activations a second time in the backward pass to save memory."""
    revision: str | None = None
    """Hub revision of the teacher."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository brings."""
    seed: int = 0
    """Seed of the adapter's starting weights and of the order of batches."""
    force: bool = False
    """Replace the output folder if it already holds something."""

    def check(self) -> None:
        """Raise UsageError listing everything that cannot work."""
        wrong = range_errors(self, _ADAPT)
        if not self.target_modules:
            wrong.append("target_modules is empty; name matrices, or all-linear")
        if wrong:
            raise UsageError("\n".join(wrong))
