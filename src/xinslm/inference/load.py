"""Choose and load the engine that runs a model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xinslm.errors import UsageError
from xinslm.inference.config import EngineConfig
from xinslm.inference.engine import Engine
from xinslm.ranges import Activations

if TYPE_CHECKING:
    from xinslm.inference.raw_weights import RawModel


def load_engine(config: EngineConfig) -> Engine:
    """Load a model with its tokenizer; UsageError if the engine that is asked for cannot run it."""
    raw, problem = None, ""
    if config.engine != "pytorch":
        raw, problem = native_model(config.model, config.device, config.dtype, config.activations)
    if config.engine == "native" and problem:
        raise UsageError(f"--engine native: {problem}")
    if raw is None or problem:
        because = f" ({problem})" if problem else ""
        if config.kv_cache != "float16":
            raise UsageError(f"--kv-cache {config.kv_cache} needs the native engine{because}")
        if config.draft not in ("auto", "none"):
            raise UsageError(f"--draft {config.draft} needs the native engine{because}")
        return _pytorch(config)
    from xinslm.inference.native_engine import NativeEngine

    length, threads, cache = config.max_seq_length, config.threads, config.kv_cache
    target = NativeEngine.load(config.model, length, threads, cache, raw)
    if config.draft == "none":
        return target
    from xinslm.inference.speculative import LookupDrafter, ModelDrafter, Speculative

    if config.draft in ("auto", "lookup"):
        return Speculative(target, LookupDrafter())
    try:
        drafter = NativeEngine.load(config.draft, None, threads, cache)
    except UsageError as error:
        raise UsageError(
            f"--draft {config.draft} is neither lookup nor none, nor a model that runs: {error}"
        ) from None
    return Speculative(target, ModelDrafter(drafter))


def missing_library(config: EngineConfig) -> str:
    """A note if PyTorch's slower engine runs a model because there is no native library; empty if
    that is not why, or was asked for.
    """
    if config.engine != "auto":
        return ""
    return library_note(config.model, config.device, config.dtype, config.activations)


def library_note(
    model: Path | str, device: str, dtype: str, activations: Activations | None = None
) -> str:
    """The note of `missing_library`, where the engine is left open."""
    from xinslm.native import reason, wanted

    if not wanted() or not reason() or device not in ("auto", "cpu") or dtype != "auto":
        return ""
    if _readable(model, device, activations)[1]:
        return ""
    return f"PyTorch runs the model, several times more slowly: {reason()} (xinslm native)"


def native_problem(
    model: Path | str,
    device: str = "auto",
    dtype: str = "auto",
    activations: Activations | None = None,
) -> str:
    """Why the native engine does not run a model with these options; empty if it does."""
    return native_model(model, device, dtype, activations)[1]


def native_model(
    model: Path | str,
    device: str = "auto",
    dtype: str = "auto",
    activations: Activations | None = None,
) -> "tuple[RawModel | None, str]":
    """The model as the native engine reads it, and why that does not run it."""
    from xinslm.native import library, reason

    if device not in ("auto", "cpu"):
        return None, f"it computes on the CPU, not on {device}"
    if dtype != "auto":
        return None, f"--dtype {dtype} is a setting of PyTorch's engine"
    if library() is None:
        return None, reason()
    return _readable(model, device, activations)


def _readable(
    model: Path | str, device: str, activations: Activations | None
) -> "tuple[RawModel | None, str]":
    """As `native_model`, where there is a library."""
    from xinslm.inference.raw_weights import open_raw

    raw = open_raw(model)
    if raw is None:
        return None, "it does not read this kind of model or of weights"
    if activations == "float" and raw.coded:
        return raw, "it rounds the inputs of 4-bit and 8-bit weights to int8"
    if activations == "int8" and not raw.coded:
        return raw, "the model has no 4-bit or 8-bit weights for --activations int8"
    if device != "cpu" and _has_accelerator():
        return raw, "an accelerator is there"
    return raw, ""


def _has_accelerator() -> bool:
    """Whether `--device auto` would take a GPU; asked without importing PyTorch where none can
    be.
    """
    if sys.platform == "linux" and not any(
        Path(place).exists() for place in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    ):
        return False
    if sys.platform == "darwin":  # the CPU reads 4-bit weights as they are; MPS needs them in full
        return False
    from xinslm.device import pick_device

    return pick_device("auto").type != "cpu"


def _pytorch(config: EngineConfig) -> Engine:
    import torch

    from xinslm.inference.torch_engine import TorchEngine

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return TorchEngine.load(
        config.model,
        config.device,
        config.dtype,
        config.max_seq_length,
        config.activations or "float",
    )
