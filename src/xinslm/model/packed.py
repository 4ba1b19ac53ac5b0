"""Linear layers for generation on a CPU, with weights in the order that the kernels read.

`F.linear` reorders a weight matrix in each call. For the few rows of a decoding step that costs up
to half of the time. Packed weights are a second copy, in bfloat16 (oneDNN) or float32 (MKL, for one
number of rows); other shapes take the plain matrices. The operators are those that `torch.compile`
emits. Without them the plain matrices do it all.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""(..., in) -> (..., out)."""

MOST_BYTES = 4 << 30
"""Weights of larger models are not copied."""
MOST_ROWS = 256
"""Rows from which reordering a matrix costs little."""


def can_pack(weight: Tensor, total_bytes: int) -> bool:
    """Whether the weights of a model like this may be packed."""
    return weight.device.type == "cpu" and weight.dtype in _PACK and total_bytes <= MOST_BYTES


def product(weights: list[Tensor], rows: int, pack: bool) -> Product:
    """Return x @ W.T for the matrices one below the other; packed for `rows` rows if `pack`."""

    def plain(x: Tensor) -> Tensor:
        parts = [F.linear(x, weight) for weight in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    if not pack or not _works(weights[0].dtype):
        return plain
    packed = _PACK[weights[0].dtype](weights, rows)

    def either(x: Tensor) -> Tensor:
        result = packed(x) if x.numel() < MOST_ROWS * x.shape[-1] else None
        return plain(x) if result is None else result

    return either


def _mkl(weights: list[Tensor], rows: int) -> Callable[[Tensor], Tensor | None]:
    if rows < 8:  # MKL gains nothing
        return lambda x: None
    linear = torch.ops.mkl._mkl_linear
    packed = [torch.ops.mkl._mkl_reorder_linear_weight(weight, rows) for weight in weights]

    def multiply(x: Tensor) -> Tensor | None:
        if x.numel() != rows * x.shape[-1]:
            return None
        parts = [linear(x, p, w, None, rows) for p, w in zip(packed, weights, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    return multiply


def _onednn(weights: list[Tensor], rows: int) -> Callable[[Tensor], Tensor | None]:
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    packed = torch.ops.mkldnn._reorder_linear_weight(whole, max(rows, 16))
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, packed, None, "none", [], "")


_PACK = {torch.float32: _mkl, torch.bfloat16: _onednn}


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch and this processor have the operator, and it is right."""
    x, weight = (torch.sin(torch.arange(n * 48.0)).view(n, 48).to(dtype) for n in (8, 32))
    try:
        found = _PACK[dtype]([weight], 8)(x)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return found is not None and torch.allclose(found, F.linear(x, weight), 2e-2, 2e-2)
