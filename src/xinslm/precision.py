"""Number types of matrix products, and how fast this machine multiplies in each.

Some processors multiply bfloat16 several times faster than float32 (AVX512-BF16, AMX, CUDA), others
slower. `auto` measures which, once per process and in a third of a second.

On CPU PyTorch multiplies float32 matrices with MKL, which leaves AVX512 unused on processors that
are not Intel's, or with oneDNN if `torch.backends.mkldnn.matmul.fp32_precision` is "bf16". That
setting allows oneDNN to round the factors to bfloat16, which it does with AMX and not without.
"""

import math
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXACT_SHARE = 0.1
"""Share of the linear layers, the last ones, that `round_products` leaves alone."""
MIN_GAIN = 1.5
"""How many times faster bfloat16 products must be for `auto` to choose them."""
CHOICE_SECONDS, PEAK_SECONDS = 0.3, 0.2
"""How long the choice of a type, and the measurement of the peak, multiply."""


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that `auto`, `float32` or `bfloat16` means on this device."""
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device.type) else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def use_fast_float32() -> None:
    """Let the float32 products of this process on CPU run in the library that is faster here.

    On an EPYC of the fifth generation oneDNN multiplies 2.2 times as fast as MKL. The rule looks at
    the processor, not at a clock: equal runs give equal bits.
    """
    torch.backends.mkldnn.matmul.fp32_precision = float32_setting()  # type: ignore[attr-defined]


@cache
def float32_setting() -> str:
    """The setting with which float32 products on CPU are exact and fastest."""
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bf16" if is_wide and not _is_intel() and not rounds_on_request() else "none"


def _is_intel() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    return "GenuineIntel" in text


@cache
def rounds_on_request() -> bool:
    """Whether oneDNN rounds the factors of float32 products to bfloat16 if it may."""
    left, right = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)) + 1
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    products = []
    for setting in ("none", "bf16"):
        matmul.fp32_precision = setting
        products.append(left @ right)
    matmul.fp32_precision = before
    return not torch.allclose(products[0], products[1], rtol=1e-5)


@cache
def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are at least `MIN_GAIN` times faster than float32 ones."""
    if device != "cpu":
        return device == "cuda" and torch.cuda.is_bf16_supported()
    fast, slow = best_seconds((torch.bfloat16, torch.float32), device, 256, CHOICE_SECONDS)
    return MIN_GAIN * fast < slow


@cache
def product_rate(
    dtype: torch.dtype, device: str, size: int = 1024, seconds: float = PEAK_SECONDS
) -> float:
    """Operations per second of matrix products on this device, the best of those that fit into
    `seconds`; the peak that utilisation is measured against.

    A multiplication and an addition are two operations; the matrices are (2 size, size) and
    (size, size).
    """
    return 4 * size**3 / best_seconds((dtype,), device, size, seconds)[0]


def best_seconds(
    dtypes: tuple[torch.dtype, ...], device: str, size: int, seconds: float
) -> list[float]:
    """The shortest time of a matrix product in each type.

    The types take turns until the products have taken `seconds`: a process that has just started
    may have two threads on one core, and its products then take thirty times as long for a tenth
    of a second. The first round prepares kernels and does not count.
    """
    factors = [
        (
            torch.randn(2 * size, size, device=device, dtype=dtype),
            torch.randn(size, size, device=device, dtype=dtype),
        )
        for dtype in dtypes
    ]
    best, spent, rounds = [math.inf] * len(dtypes), 0.0, 0
    while spent < seconds or rounds < 4:
        times = [product_seconds(left, right) for left, right in factors]
        if rounds:
            best = [min(pair) for pair in zip(best, times, strict=True)]
        spent, rounds = spent + sum(times), rounds + 1
    return best


def product_seconds(left: Tensor, right: Tensor) -> float:
    """Seconds of one product of (a, b) and (c, b) transposed."""
    began = time.perf_counter()
    (left @ right.t())[0, 0].item()
    return time.perf_counter() - began


def weight_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The type that a model's weights are loaded in for inference; `auto` means float32 on CPU and
    MPS, where `round_products` can follow, and bfloat16 on CUDA.
    """
    if name == "auto":
        is_cuda = torch.device(device).type == "cuda"
        name = "bfloat16" if is_cuda and has_fast_bfloat16("cuda") else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def has_narrow_products(name: str, device: torch.device | str) -> bool:
    """Whether `auto` means a CPU here whose bfloat16 products are faster."""
    return name == "auto" and torch.device(device).type == "cpu" and has_fast_bfloat16("cpu")


def rounds_products(name: str, device: torch.device | str) -> bool:
    """Whether `auto` means float32 weights whose products are rounded here: a CPU with AMX."""
    return has_narrow_products(name, device) and rounds_on_request()


def round_products(model: nn.Module) -> None:
    """Make the linear layers of `model` multiply in bfloat16 on a CPU with AMX, and sum in float32,
    except for the last tenth of them.

    Only the factors of a product are rounded; weights, activations, attention, norms and the head
    stay float32. The last layers matter more than others: exact ones there bring the KL divergence
    from the model in float32 below 1e-4 (SmolLM2-135M; .8e-3 for a model in bfloat16).
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in layers[: math.ceil(len(layers) * (1 - EXACT_SHARE))]:
        module.register_forward_pre_hook(_round)
        module.register_forward_hook(_restore, always_call=True)


def _round(module: nn.Module, inputs: Any) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


def _restore(module: nn.Module, inputs: Any, output: Tensor | None) -> None:
    use_fast_float32()
