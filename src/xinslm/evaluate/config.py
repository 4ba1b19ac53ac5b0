"""Settings of `xinslm evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xinslm.errors import UsageError


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how well a model predicts text: bits per byte and perplexity."""

    model: Annotated[Path, tyro.conf.Positional]
    """Model folder, run folder (its best checkpoint), 4-bit folder or Hub name; any causal
    model.
    """
    data_path: tuple[str, ...]
    """Dataset folder made by `xinslm prepare`, or raw files (.txt .json .jsonl .parquet, also
    .gz).
    """
    split: Literal["train", "validation"] = "validation"
    """Part of a dataset folder to measure on."""
    max_documents: int | None = None
    """Measure on the first so many documents; more than there are is an error."""
    max_seq_length: int | None = None
    """Longest window in tokens; by default the model's own context."""
    batch_tokens: int = 8192
    """Most tokens, padding included, in one forward pass; fewer need less memory."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type to compute in; likelihoods are float32 in any case."""
    run: Path | None = None
    """Run folder whose evaluation.json receives the figures, for `xinslm report`."""
    name: str | None = None
    """What the row is called in the report; by default the model folder's name."""

    def check(self) -> None:
        """Raise UsageError listing all settings that make no sense."""
        wrong = []
        if not self.data_path:
            wrong.append("--data-path is empty; name a dataset folder or raw files")
        for name in ("max_documents", "max_seq_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                wrong.append(f"{name} is {value}, but must be at least 1")
        if wrong:
            raise UsageError("\n".join(wrong))
