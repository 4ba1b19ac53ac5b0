"""Float32 products on CPU: the faster library, and never a rounded factor."""

import pytest
import torch

import xinslm.precision
from xinslm.device import pick_device


@pytest.mark.parametrize(
    ("capability", "intel", "rounds", "expected"),
    [
        ("AVX512", False, False, "bf16"),
        ("AVX512", True, False, "none"),  # MKL uses the whole width there
        ("AVX512", False, True, "none"),
        ("AVX2", False, False, "none"),
    ],
)
def test_the_processor_decides(monkeypatch, capability, intel, rounds, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(xinslm.precision, "_is_intel", lambda: intel)
    monkeypatch.setattr(xinslm.precision, "rounds_on_request", lambda: rounds)
    assert xinslm.precision.float32_setting.__wrapped__() == expected


def test_a_device_that_is_picked_has_exact_products():
    """An error of the size that sums in float32 have; factors of 8 bits would make it 100 times."""
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    pick_device("cpu")
    assert torch.backends.mkldnn.matmul.fp32_precision == xinslm.precision.float32_setting()
    left, right = torch.randn(
        2, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    error = (left.float() @ right.float()).double() - left @ right
    assert error.abs().max() < 1e-4
    assert error.abs().mean() < 1e-5


def test_looking_for_rounding_leaves_the_setting_alone():
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    xinslm.precision.rounds_on_request.__wrapped__()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    pick_device("cpu")
