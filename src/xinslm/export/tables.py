"""Embedding and LM head of a GGUF file in a type of their own (`export gguf --embedding-type`).

Q8_0 has one scale for 32 weights, Q6_K (`model/k_quants.py`) a scale of 8 bits for 16 and one of
16 bits for 256: 8.5 and 6.56 bits a weight.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.model.config import ModelConfig
from xinslm.model.grids import BLOCK, Q8_0, check_range, decode, encode, fit_scales, to_ggml
from xinslm.model.k_quants import Q6_K_BYTES, SUPER_BLOCK, quantize_q6_k

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
BLOCKS = {"q8_0": (BLOCK, Q8_0.block_bytes), "q6_k": (SUPER_BLOCK, Q6_K_BYTES)}
"""Weights and bytes of a block of each type."""
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_MAX_ERROR = 0.05


def require_blocks(model: ModelConfig, kind: str | None) -> None:
    """Raise UsageError if the rows of the tables are not made of blocks of that type."""
    size = BLOCKS[kind][0] if kind in BLOCKS else 1
    if model.hidden_size % size:
        other = "q8_0" if kind == "q6_k" and model.hidden_size % BLOCK == 0 else "f16"
        raise UsageError(
            f"--embedding-type {kind} needs rows of a multiple of {size} weights; this model's "
            f"embedding has {model.hidden_size:,}. Choose --embedding-type {other}"
        )


def to_blocks(weight: Tensor, kind: str, name: str) -> tuple[np.ndarray, Tensor]:
    """Quantize float32 rows to llama.cpp's blocks, uint8 (rows, bytes); also their values."""
    if kind == "q8_0":
        codes, scales = _q8_0(weight, name)
        return to_ggml(codes, scales.half()), decode(codes, scales)
    return _q6_k(weight, name)


def rounded(weight: Tensor, kind: str, name: str) -> Tensor:
    """The float32 values that `to_blocks` stores for float32 rows."""
    if kind == "q8_0":
        return decode(*_q8_0(weight, name))
    return _q6_k(weight, name)[1]


def hash_values(values: np.ndarray) -> str:
    """Hash of float32 values, by which they are compared without a second search for codes."""
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the squared error over that of the squared values."""
    total = np.square(expected, dtype=np.float64).sum()
    error = np.square(found - expected, dtype=np.float64).sum()
    return float(np.sqrt(error / total)) if total else 0.0


def _q8_0(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not check_range(weight, Q8_0).fits:
        raise _unfit(name, "q8_0")
    scales = fit_scales(weight, Q8_0)
    return encode(weight, scales, Q8_0), scales


def _q6_k(weight: Tensor, name: str) -> tuple[np.ndarray, Tensor]:
    """Blocks (rows, bytes) and their values (rows, columns)."""
    try:
        quantized = quantize_q6_k(weight)
    except ValueError:
        raise _unfit(name, "q6_k") from None
    values = quantized.decode().view_as(weight)
    if relative_error(values.numpy(), weight.numpy()) > _MAX_ERROR:
        raise _unfit(name, "q6_k")
    return quantized.pack().reshape(len(weight), -1), values


def _unfit(name: str, kind: str) -> XinslmError:
    return XinslmError(
        f"weight '{name}' has values that the float16 scales of {kind} cannot hold: choose "
        "--embedding-type bf16"
    )
