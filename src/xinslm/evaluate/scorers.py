"""Load what `xinslm evaluate` measures: models score text with the adapters of teachers."""

from pathlib import Path

import torch

from xinslm.errors import UsageError
from xinslm.inference.torch_engine import load_transformer
from xinslm.model.files import QUANTIZED_WEIGHTS, is_own, resolve_model, weight_files
from xinslm.quantize.canonical import is_quantized
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.own import OwnTeacher
from xinslm.tokenizer.load import load_tokenizer


def load_scorer(
    path: Path, device: torch.device, dtype: str = "float32", context: int | None = None
) -> tuple[DenseTeacher, dict[str, str | int]]:
    """Load any model folder; also return its kind, parameters and file_bytes."""
    folder = resolve_model(path)
    quantized = is_quantized(folder)
    scorer: DenseTeacher
    if quantized or is_own(folder):
        model = load_transformer(folder, getattr(torch, dtype))
        parameters = model.config.num_parameters
        scorer = OwnTeacher(str(path), folder, model, load_tokenizer(folder), device)
    else:
        from xinslm.teachers.huggingface import HuggingFaceTeacher

        other = HuggingFaceTeacher(str(path), dtype, device)
        parameters = sum(weight.numel() for weight in other.model.parameters())
        scorer = other
    if context is not None:
        if context > scorer.max_length:
            raise UsageError(
                f"--max-seq-length {context}: {path} reads at most {scorer.max_length:,} tokens"
            )
        scorer.max_length = context
    files = [folder / QUANTIZED_WEIGHTS] if quantized else weight_files(folder)
    file_bytes = sum(file.stat().st_size for file in files)
    kind = "quantized" if quantized else "model"
    return scorer, {"kind": kind, "parameters": parameters, "file_bytes": file_bytes}
