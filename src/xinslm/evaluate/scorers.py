"""Load what `xinslm evaluate` measures: models score text with the adapters of teachers."""

from pathlib import Path

import torch

from xinslm.errors import UsageError
from xinslm.evaluate.native_scorer import NativeScorer, int8_layers
from xinslm.inference.raw_weights import RawModel, open_raw
from xinslm.model.files import open_model
from xinslm.native import library
from xinslm.ranges import Activations
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.own import OwnTeacher


def load_scorer(
    path: Path,
    device: torch.device,
    dtype: str = "float32",
    context: int | None = None,
    activations: Activations = "float",
) -> tuple[DenseTeacher, dict[str, str | int]]:
    """Load any model; also return its kind, parameters, file_bytes and activations.

    The native library computes int8 activations, if it is there and reads the model.

    UsageError if it has no codes and `activations` is int8; UnsupportedModelError if it then is no
    model that `Transformer` supports.
    """
    source = open_model(path)
    is_int8 = activations == "int8"
    scorer: OwnTeacher | HuggingFaceTeacher | NativeScorer
    if is_int8 and (raw := _native(path, device, dtype)) is not None:
        scorer = NativeScorer(path, raw, source.fingerprint)
        parameters = source.config.num_parameters
        rounded, total = int8_layers(raw)
    elif source.is_own or is_int8:
        scorer = OwnTeacher(source, dtype, device, activations=activations)
    else:
        scorer = HuggingFaceTeacher(source, dtype, device)
    if not isinstance(scorer, NativeScorer):
        parameters = sum(weight.numel() for weight in scorer.model.parameters())
        if is_int8:
            rounded, total = scorer.model.int8_layers
    if context is not None:
        if context > scorer.max_length:
            raise UsageError(
                f"--max-seq-length {context}: {path} reads at most {scorer.max_length:,} tokens"
            )
        scorer.max_length = context
    facts: dict[str, str | int] = {
        "kind": source.kind,
        "parameters": parameters,
        "file_bytes": source.weight_bytes,
    }
    facts["activations"] = "float"
    if is_int8:
        engine = ", native engine" if isinstance(scorer, NativeScorer) else ""
        facts["activations"] = f"int8 in {rounded} of {total} linear layers{engine}"
    return scorer, facts


def _native(path: Path, device: torch.device, dtype: str) -> RawModel | None:
    """The model for the native engine; None if that is not there or does not run it so."""
    if library() is None or device.type != "cpu" or dtype not in ("auto", "float32"):
        return None
    raw = open_raw(path)
    return raw if raw is not None and raw.coded else None
