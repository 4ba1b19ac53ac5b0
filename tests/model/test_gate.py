"""The gate of a feed-forward part against autograd's own."""

import pytest
import torch
import torch.nn.functional as F

from xinslm.model.gate import gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (2, 700, 400), (0, 8)], ids=str)
def test_values_and_gradients_are_autograds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    results = []
    for product in (gated, lambda g, u: F.silu(g) * u):
        inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        y = product(*inputs)
        y.backward(upstream)
        results.append([y.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)  # PyTorch's exp differs at the ends of vectors


def test_gradients_are_finite_differences() -> None:
    gate, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gated, (gate, up))


def test_gradients_of_another_layout_and_of_one_input_alone() -> None:
    gate, up = torch.randn(6, 4), torch.randn(6, 4, requires_grad=True)
    gated(gate, up).t().sum().backward()
    torch.testing.assert_close(up.grad, F.silu(gate))
    with torch.no_grad():
        expected = F.silu(gate) * up
        torch.testing.assert_close(gated(gate, up), expected)
