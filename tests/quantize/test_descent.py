"""Descent of codes and scales against brute force in float64."""

import pytest
import torch

from xinslm.model.grids import Q4_0, decode, encode, fit_scales, storable
from xinslm.quantize.descent import best_scale, descend, sweep
from xinslm.quantize.gptq import Hessian, factorise, feed_back_errors


def problem(rows=24, columns=96, tokens=400, seed=0):
    """Weights, GPTQ's codes and scales for them, and the factor of their inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, 32, generator=generator) @ torch.randn(
        32, columns, generator=generator
    ) + torch.randn(tokens, columns, generator=generator)
    hessian = Hessian(columns)
    hessian.add(inputs)
    factor = factorise(hessian.mean())
    weight = torch.randn(rows, columns, generator=generator)
    scales = fit_scales(weight, Q4_0, factor.importance)
    return weight, feed_back_errors(weight, scales, factor), scales, factor


def losses(weight, codes, scales, hessian):
    error = (weight - decode(codes, scales)).double()
    return ((error @ hessian.double()) * error).sum(1)


def neighbours(scale, count=40):
    """Storable scales around each of the given ones, (count, rows)."""
    return torch.stack([storable(scale * (1 + i / 256)) for i in range(-count // 2, count // 2)])


def by_brute_force(weight, codes, scales, hessian):
    """One sweep: each scale against 40 near it, each code against all 16, by the loss itself."""
    codes, scales = codes.clone(), scales.clone()
    rows = torch.arange(len(weight))
    for block in range(codes.shape[1] // 32):
        candidates = torch.cat([scales[None, :, block], neighbours(scales[:, block])])
        tries = []
        for candidate in candidates:
            other = scales.clone()
            other[:, block] = candidate
            tries.append(losses(weight, codes, other, hessian))
        scales[:, block] = candidates[torch.stack(tries).argmin(0), rows]
        for column in range(32 * block, 32 * block + 32):
            tries = []
            for code in range(-8, 8):
                other = codes.clone()
                other[:, column] = code
                tries.append(losses(weight, other, scales, hessian))
            codes[:, column] = torch.stack(tries).argmin(0).to(torch.int8) - 8
    return codes, scales


def test_a_sweep_finds_what_brute_force_finds():
    weight, codes, scales, factor = problem(rows=6, columns=96)
    hessian = factor.damped()
    expected = by_brute_force(weight, codes, scales, hessian)
    chosen, steps = codes.T.float(), scales.T.contiguous()
    pull = hessian @ (weight - decode(codes, scales)).T
    sweep(pull, chosen, steps, hessian)
    found = chosen.T.to(torch.int8), steps.T
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], codes) and not torch.equal(found[1], scales)
    after = hessian @ (weight - decode(*found)).T
    torch.testing.assert_close(pull, after, rtol=1e-3, atol=1e-3)


def test_a_scale_keeps_its_sign_and_is_not_made_worse():
    """Codes that point away from the weights ask for a scale of the other sign."""
    codes = torch.ones(32, 3)
    codes[:, 2] = 0  # no code, so any scale is as good
    scale, hessian = torch.full((3,), 0.5), torch.eye(32)
    wanted = torch.tensor([0.75, -0.75, 0.1]).expand(32, 3)
    found = best_scale(hessian @ (wanted - codes * scale), codes, scale, hessian)
    assert found.tolist() == [0.75, 0.5, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_no_row_gets_worse_and_all_together_better(seed):
    weight, codes, scales, factor = problem(seed=seed)
    hessian = factor.damped()
    better = descend(weight, codes, scales, hessian)
    before, after = (losses(weight, *x, hessian) for x in ((codes, scales), better))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.95 * before.sum()
    assert better[0].min() >= -8 and better[0].max() <= 7 and better[0].dtype == torch.int8
    assert torch.equal(storable(better[1]), better[1])


def test_rows_in_parts_get_what_they_get_together(monkeypatch):
    weight, codes, scales, factor = problem(rows=50)
    whole = descend(weight, codes, scales, factor.damped())
    monkeypatch.setattr("xinslm.quantize.descent._ROWS", 16)
    parts = descend(weight, codes, scales, factor.damped())
    assert (whole[0] == parts[0]).float().mean() > 0.99, "float32 may decide a near-tie otherwise"


@pytest.mark.parametrize("kind", ["zero block", "zero row", "dead columns"])
def test_blocks_without_weights_or_inputs(kind):
    weight, _, _, factor = problem()
    hessian = factor.hessian.clone()
    if kind == "zero block":
        weight[:, 32:64] = 0
    elif kind == "zero row":
        weight[3] = 0
    else:
        hessian[32:64] = 0
        hessian[:, 32:64] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    scales = fit_scales(weight, Q4_0)
    codes = encode(weight, scales, Q4_0)
    found = descend(weight, codes, scales, hessian)
    before, after = (losses(weight, *x, hessian) for x in ((codes, scales), found))
    assert torch.isfinite(found[1]).all() and (found[1] != 0).all()
    assert (after <= before * (1 + 1e-5) + 1e-9).all()
