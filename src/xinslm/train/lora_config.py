"""Settings of `adapt`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import POSITIVE, Range, range_errors
from xinslm.train.config import TrainingConfig

_ADAPT = {
    "lora_r": Range(1, 1024),
    "lora_alpha": POSITIVE,
    "lora_dropout": Range(0, 1, below=True),
    "num_epochs": POSITIVE,
    "max_steps": Range(1),
}


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(TrainingConfig):
    """Fit a teacher to the text at hand with a LoRA adapter, before it is cached."""

    teacher: Annotated[str, POSITIONAL]
    """Teacher: any causal model, also a quantized folder or a GGUF file."""
    data_path: Path
    """Dataset folder made by `xinslm prepare` with the teacher's own tokenizer."""
    output_dir: Annotated[Path, Alias("-o")]
    """Run folder to write; the adapter is at its top, in peft's layout. The same command continues
    a killed run."""
    lora_r: int = 16
    """Rank of the update of each matrix."""
    lora_alpha: float = 32.0
    """The update is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Share of an adapted matrix' inputs left out of its update in training."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the matrices to adapt, or all-linear: all of the blocks."""
    num_epochs: float = 1.0
    """Passes over the training split."""
    max_steps: int | None = None
    """Optimizer steps, instead of epochs."""
    learning_rate: float = 2e-4
    """Peak of the warmup-stable-decay schedule."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises from 0."""
    decay_ratio: float = 0.97
    """Share of the steps in which it falls linearly to 0."""
    weight_decay: float = 0.0
    """The optimizer's decoupled decay, on matrices only."""
    max_eval_samples: int = 100
    """Validation sequences to measure before and after; 0 for all."""
    save_steps: int = 50
    """Steps between checkpoints: what a kill costs at most."""
    revision: str | None = None
    """Hub revision of the teacher."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository brings."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = [*super().errors(), *range_errors(self, _ADAPT)]
        if not self.target_modules:
            wrong.append("target_modules is empty; name matrices, or all-linear")
        return wrong
