"""Settings of `xinslm evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import POSITIONAL
from xinslm.ranges import Activations, Device, Dtype, Range, Settings, range_errors

_EVALUATE = dict.fromkeys(("max_documents", "max_seq_length", "batch_tokens"), Range(1))


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Measure how well a model predicts text: bits per byte and perplexity."""

    model: Annotated[Path, POSITIONAL]
    """Any causal model: a model, run or quantized folder, a GGUF file, or a Hub name."""
    data_path: tuple[str, ...]
    """Dataset folder made by `xinslm prepare`, or raw files (.txt .json .jsonl .parquet, also
    .gz).
    """
    split: Literal["train", "validation"] = "validation"
    """Part of a dataset folder to measure on."""
    max_documents: int | None = None
    """Number of documents to measure on, from the beginning; more than there are is an error."""
    max_seq_length: int | None = None
    """Longest window in tokens; by default the model's own context."""
    batch_tokens: int = 2048
    """Most tokens, padding included, in one forward pass; fewer need less memory."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: Dtype = "auto"
    """Type to compute in; auto: float32, with products in bfloat16 on CPUs with AMX."""
    activations: Activations = "float"
    """Inputs of linear layers: as they are, or rounded to int8 blocks, as llama.cpp does to those
    of 4-bit and 8-bit weights; the model needs such weights. Computed in the native engine, or,
    much more slowly, in PyTorch.
    """
    run: Path | None = None
    """Run folder whose evaluation.json receives the metrics, for `xinslm report`."""
    name: str | None = None
    """What the row is called in the report; by default the model folder's name."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _EVALUATE)
        if not self.data_path:
            wrong.append("data_path is empty; name a dataset folder or raw files")
        return wrong
