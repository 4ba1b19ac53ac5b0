"""LoRA adapters for teachers: folders in peft's layout, safetensors only, bound to the weights that
they were trained on.

An adapter of `xinslm adapt` has a manifest with the fingerprint of its base model and is refused
for any other. For other adapters, the matrices must match those of the teacher. In float32 the
adapter is merged into the weights; in narrower types it stays separate, because rounding would
erase small updates.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.files import MANIFEST, read_json, read_manifest, sha256_file, sha256_json

KIND, VERSION, MADE_BY = "adapter", 1, "xinslm adapt"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def require_peft() -> ModuleType:
    """Import peft; UsageError with the install command if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            f'adapters need peft, which cannot be imported ({error}): pip install "xinslm[lora]"'
        ) from None
    module: ModuleType = peft
    return module


def adapter_hash(folder: Path) -> str:
    """Return a hash of an adapter's weights and settings, without the path of its base model."""
    settings = read_json(folder / CONFIG)
    meaning = {
        key: sorted(value)
        if isinstance(value, list) and all(isinstance(x, str) for x in value)
        else value
        for key, value in settings.items()
        if key not in ("base_model_name_or_path", "revision", "peft_version")
    }
    return sha256_json([meaning, sha256_file(folder / WEIGHTS)])


def check_adapter(folder: Path, base: str, name: str) -> None:
    """Raise an error unless `folder` is a LoRA adapter that can belong to the teacher with
    fingerprint `base`.
    """
    if (folder / MANIFEST).is_file():
        trained_on = read_manifest(folder, KIND, VERSION, MADE_BY)["inputs"]["teacher"]
        if trained_on != base:
            raise UsageError(
                f"adapter {folder} was trained on other weights than those of {name} "
                f"(fingerprints {trained_on[:12]} and {base[:12]}). Pass the teacher it was "
                f"trained on, or run `{MADE_BY} {name}`"
            )
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} is not an adapter folder: it has no {CONFIG}. Create one with `{MADE_BY}`"
        )
    if not (folder / WEIGHTS).is_file():
        raise XinslmError(f"{folder} has no {WEIGHTS}; xinslm reads weights from safetensors only")
    settings = read_json(folder / CONFIG)
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise UsageError(f"{folder} is an adapter of type {kind}; only LORA is supported")


def apply_adapter(model: Any, folder: Path, name: str) -> Any:
    """Apply an adapter to a transformers model; return a model of the same class."""
    import torch
    from safetensors import SafetensorError, safe_open

    peft = require_peft()
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as tensors:
            stored = set(tensors.keys())
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise XinslmError(
            f"adapter {folder} cannot be applied to teacher {name}: {first}"
        ) from error
    expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if unknown := sorted(stored ^ expected):  # peft only warns
        raise XinslmError(
            f"adapter {folder} does not fit teacher {name}: {len(unknown)} of its matrices have "
            f"no counterpart, such as '{unknown[0]}'"
        )
    if next(model.parameters()).dtype == torch.float32:
        return adapted.merge_and_unload()
    return adapted.get_base_model()
