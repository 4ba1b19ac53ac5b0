"""Choose and load the engine that runs a model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xinslm.errors import UsageError
from xinslm.inference.config import CacheType, EngineName
from xinslm.inference.engine import Engine
from xinslm.ranges import Activations, Device, Dtype

if TYPE_CHECKING:
    from xinslm.inference.raw_weights import RawModel


def load_engine(
    model: Path | str,
    engine: EngineName = "auto",
    *,
    context_length: int | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    activations: Activations | None = None,
    threads: int | None = None,
    cache: CacheType = "float16",
    draft: str = "none",
) -> Engine:
    """Load `model` with its tokenizer; UsageError if the engine that is asked for cannot run it.

    `activations`: float or int8; None is int8 in the native engine and float in PyTorch. `draft`:
    where guesses come from that the engine checks several at a time: lookup, auto (lookup if the
    engine is native), none, or a smaller model.
    """
    raw, problem = None, ""
    if engine != "pytorch":
        raw, problem = _native(model, device, dtype, activations)
    if engine == "native" and problem:
        raise UsageError(f"--engine native: {problem}")
    if raw is None or problem:
        because = f" ({problem})" if problem else ""
        for wanted, option in (
            (cache != "float16", f"--kv-cache {cache}"),
            (
                draft not in ("auto", "none"),
                f"--draft {draft}",
            ),
        ):
            if wanted:
                raise UsageError(f"{option} needs the native engine{because}")
        return _pytorch(model, context_length, device, dtype, activations, threads)
    from xinslm.inference.native_engine import NativeEngine

    target = NativeEngine.load(model, context_length, threads, cache, raw)
    if draft == "none":
        return target
    from xinslm.inference.speculative import LookupDrafter, ModelDrafter, Speculative

    if draft in ("auto", "lookup"):
        return Speculative(target, LookupDrafter())
    return Speculative(target, ModelDrafter(NativeEngine.load(draft, None, threads, cache)))


def native_problem(
    model: Path | str,
    device: Device = "auto",
    dtype: Dtype = "auto",
    activations: Activations | None = None,
) -> str:
    """Why the native engine does not run a model with these options; empty if it does."""
    return _native(model, device, dtype, activations)[1]


def _native(
    model: Path | str, device: Device, dtype: Dtype, activations: Activations | None
) -> "tuple[RawModel | None, str]":
    """The model as the native engine reads it, and why that does not run it."""
    from xinslm.native import library, reason

    if device not in ("auto", "cpu"):
        return None, f"it computes on the CPU, not on {device}"
    if dtype != "auto":
        return None, f"--dtype {dtype} is a setting of PyTorch's engine"
    if library() is None:
        return None, reason()
    from xinslm.inference.raw_weights import open_raw

    raw = open_raw(model)
    if raw is None:
        return None, "it does not read this kind of model or of weights"
    if activations == "float" and raw.coded:
        return raw, "it rounds the inputs of 4-bit and 8-bit weights to int8"
    if activations == "int8" and not raw.coded:
        return (
            raw,
            "the model has no 4-bit or 8-bit weights, whose inputs --activations int8 rounds",
        )
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


def _pytorch(
    model: Path | str,
    context_length: int | None,
    device: Device,
    dtype: Dtype,
    activations: Activations | None,
    threads: int | None,
) -> Engine:
    import torch

    from xinslm.inference.torch_engine import TorchEngine

    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEngine.load(model, device, dtype, context_length, activations or "float")
