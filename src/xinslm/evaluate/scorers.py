"""Load what `xinslm evaluate` measures: models score text with the adapters of teachers."""

from pathlib import Path

import torch

from xinslm.errors import UsageError
from xinslm.model.files import open_model
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.own import OwnTeacher


def load_scorer(
    path: Path, device: torch.device, dtype: str = "float32", context: int | None = None
) -> tuple[DenseTeacher, dict[str, str | int]]:
    """Load any model; also return its kind, parameters and file_bytes."""
    source = open_model(path)
    kind = OwnTeacher if source.is_own else HuggingFaceTeacher
    scorer = kind(source, dtype, device)
    parameters = sum(weight.numel() for weight in scorer.model.parameters())
    if context is not None:
        if context > scorer.max_length:
            raise UsageError(
                f"--max-seq-length {context}: {path} reads at most {scorer.max_length:,} tokens"
            )
        scorer.max_length = context
    facts = {"kind": source.kind, "parameters": parameters, "file_bytes": source.weight_bytes}
    return scorer, facts
