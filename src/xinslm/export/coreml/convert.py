"""From weights to a package, by coremltools.

coremltools takes codes and scales from buffers whose names begin with `_COREML_`: it divides the
weight by the scale again, which gives the code exactly, because code times scale has at most 19
significant bits. The buffers hold float32 scales; its float16 pass then narrows them, which rounds
nothing. With float16 buffers the products become `matmul` of a cast weight, not `linear`.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xinslm.errors import UsageError, XinslmError
from xinslm.export.coreml.neural_engine import POSITION, TOKENS, FixedTransformer, fixed_mask
from xinslm.export.coreml.palettes import Palette
from xinslm.export.coreml.palettize import register_palettes
from xinslm.export.coreml.program import (
    INPUT_IDS,
    KEYS,
    LOGITS,
    MASK,
    VALUES,
    RootMean,
    StatefulTransformer,
    causal_mask,
)
from xinslm.export.packing import BITS
from xinslm.model.finite import all_finite
from xinslm.model.stored import StoredWeight

AnyProgram = StatefulTransformer | FixedTransformer
_QUANTIZATION = 3
"""coremltools' number for weights made of codes and scales."""
_PASSES_LEFT_OUT = {
    "common::add_int16_cast",  # positions and token ids may be beyond 16 bits
    "common::const_deduplication",  # a weight that equals another one would lose its name
}


def require_coremltools() -> None:
    """UsageError with the install command if coremltools is missing."""
    try:
        with quiet():
            import coremltools  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Core ML packages need coremltools ({error}): pip install 'xinslm[coreml]'"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' bars and remarks off the terminal: missing runtimes of macOS, versions."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def build(model: AnyProgram, weights: Iterator[tuple[str, StoredWeight | Palette]]) -> AnyProgram:
    """Give a module on the meta device its weights: codes times scales, numbers of palettes, and
    all others as float16 holds them.
    """
    parameters = dict(model.named_parameters())
    loaded: dict[str, Tensor] = {}
    for name, weight in weights:
        if name not in parameters:
            raise XinslmError(f"the Core ML program has no place for weight '{name}'")
        values = weight.decode() if isinstance(weight, Palette) else _values(name, weight)
        loaded[name] = values.view(parameters[name].shape)
        if isinstance(weight, StoredWeight) and weight.format in BITS:
            module = model.get_submodule(name.removesuffix(".weight"))
            for key, value in _marks(weight).items():
                module.register_buffer(f"_COREML_/weight/{key}", value)
    model.register_buffer("_COREML_/metadata_version", torch.tensor(1))
    if odd := sorted(parameters.keys() - loaded.keys()):
        raise XinslmError(f"the Core ML program needs weight '{odd[0]}'")
    model.load_state_dict(loaded, strict=False, assign=True)
    return model.eval()


def convert(model: AnyProgram, path: Path, palettes: Mapping[str, Palette] | None = None) -> None:
    """Write the package `path`, whose name ends in .mlpackage; `palettes` by name of weight."""
    require_coremltools()
    import coremltools as ct

    fixed = isinstance(model, FixedTransformer)
    example, inputs = _fixed(ct, model) if fixed else _ranged(ct, model)
    passes = ct.PassPipeline.DEFAULT
    passes.remove_passes(_PASSES_LEFT_OUT)
    if palettes:
        passes.append_pass(register_palettes(palettes))
    try:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(model, example, check_trace=False)
            ct.convert(
                traced,
                inputs=inputs,
                outputs=[ct.TensorType(LOGITS, dtype=np.float16)],
                states=[_state(ct, model, name) for name in (KEYS, VALUES)],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.transform.FP16ComputePrecision(_is_half),
                pass_pipeline=passes,
                skip_model_load=True,
                package_dir=str(path),
            )
    except Exception as error:  # coremltools raises many types
        raise XinslmError(f"coremltools could not convert the model: {error!s:.300}") from error


def _ranged(ct: Any, model: AnyProgram) -> tuple[tuple[Tensor, ...], list[Any]]:
    """Example and types of the inputs of `StatefulTransformer`."""
    example = torch.zeros(1, 2, dtype=torch.int32), causal_mask(2, past=1)
    new = ct.RangeDim(1, model.length, default=1)
    total = ct.RangeDim(1, model.length, default=1)
    return example, [
        ct.TensorType(INPUT_IDS, (1, new), np.int32),
        ct.TensorType(MASK, (1, 1, new, total), np.float16),
    ]


def _fixed(ct: Any, model: AnyProgram) -> tuple[tuple[Tensor, ...], list[Any]]:
    """Example and types of the inputs of `FixedTransformer`."""
    ids, position = torch.zeros(1, TOKENS, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    mask = fixed_mask(TOKENS, 1, model.length)
    return (ids, mask, position), [
        ct.TensorType(INPUT_IDS, tuple(ids.shape), np.int32),
        ct.TensorType(MASK, tuple(mask.shape), np.float16),
        ct.TensorType(POSITION, (1,), np.int32),
    ]


def _state(ct: Any, model: nn.Module, name: str) -> Any:
    shape = tuple(model.get_buffer(name).shape)
    return ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name=name)


def _is_half(op: Any) -> bool:
    """Whether an operation computes in float16: all but the sum of squares of RMSNorm."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    return RootMean.__name__ not in op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_TYPE, [])


def _marks(weight: StoredWeight) -> Mapping[str, Tensor]:
    assert weight.scales is not None, "a weight with codes has scales"
    return {
        "compression_type": torch.tensor([_QUANTIZATION]),
        "quantization_n_bits": torch.tensor(BITS[weight.format]),
        "quantization_scale": weight.scales.float(),
    }


def _values(name: str, weight: StoredWeight) -> Tensor:
    """Float32 values of a weight; UsageError if float16, which Core ML computes in, holds less."""
    values = weight.dequantize()
    half = require_half(name, values)
    return values if weight.format in BITS else half.float()


def require_half(name: str, values: Tensor) -> Tensor:
    """Values in float16; UsageError if one is beyond its range."""
    half = values.half()
    if not all_finite(half):
        raise UsageError(
            f"weight '{name}' has values beyond float16, which Core ML computes in: export the "
            "model as GGUF"
        )
    return half
