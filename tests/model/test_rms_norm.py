"""The norm, which works on pieces of rows, against plain autograd."""

import pytest
import torch

from xinslm.model.rms_norm import RMSNorm


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "expanded gradient"])
def test_pieces_give_the_norm_and_the_gradients_of_plain_autograd(layout):
    make = torch.Generator().manual_seed(0)
    shape = (3, 200, 576)  # 600 rows, 227 in a piece
    x = torch.randn(shape, generator=make)
    if layout == "heads first":
        x = x.transpose(0, 1)
    upstream = torch.randn(x.shape, generator=make)
    if layout == "expanded gradient":
        upstream = upstream[:, :, :1].expand(x.shape)
    norm = RMSNorm(576, 1e-5)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=make)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    y = norm(ours)
    expected = theirs * (theirs.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    assert (y - expected).abs().max() < 1e-5
    y.backward(upstream)
    expected.backward(upstream.double())
    assert (ours.grad - theirs.grad).abs().max() < 1e-5
    assert (norm.weight.grad - weight.grad).abs().max() < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_normalized_in_float32(dtype):
    x = (100 * torch.randn(700, 576)).to(dtype)
    norm = RMSNorm(576, 1e-5).to(dtype)
    expected = torch.nn.functional.normalize(x.double(), dim=-1) * 24
    assert (norm(x) - expected).abs().max() < 0.03  # half a unit of bfloat16 at 4 is .016
