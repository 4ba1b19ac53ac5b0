"""Number types of matrix products, and how fast this machine multiplies in each.

Some processors multiply bfloat16 several times faster than float32 (AVX512-BF16, AMX, CUDA), others
slower. `auto` measures which, once per process and in some hundredths of a second.
"""

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

MIN_GAIN = 1.5
"""How many times faster bfloat16 products must be for `auto` to choose them."""


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that `auto`, `float32` or `bfloat16` means on this device."""
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device.type) else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@cache
def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are at least `MIN_GAIN` times faster than float32 ones."""
    if device != "cpu":
        return device == "cuda" and torch.cuda.is_bf16_supported()
    fast = product_rate(torch.bfloat16, device, 256, 4)
    return fast > MIN_GAIN * product_rate(torch.float32, device, 256, 4)


@cache
def product_rate(dtype: torch.dtype, device: str, size: int = 1024, runs: int = 12) -> float:
    """Operations per second of matrix products on this device, the best of `runs`; the peak that
    utilisation is measured against.

    A multiplication and an addition are two operations; the matrices are (2 size, size) and
    (size, size).
    """
    left = torch.randn(2 * size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(runs + 1):  # the first one prepares kernels
        began = time.perf_counter()
        (left @ right.t())[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 4 * size**3 / best


def round_products(model: nn.Module) -> None:
    """Make all linear layers of `model` multiply in bfloat16 on CPU, and sum in float32.

    Only the factors of a product are rounded; weights, activations, attention and norms stay
    float32, so the result is closer to float32 than that of a model in bfloat16.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_round)
            module.register_forward_hook(_restore, always_call=True)


def _round(module: nn.Module, inputs: Any) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


def _restore(module: nn.Module, inputs: Any, output: Tensor) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
