"""Descent of codes and scales against brute force and float64 least squares."""

import itertools

import pytest
import torch

from xinslm.model.grids import Q4_0, decode, encode, fit_scales, storable
from xinslm.quantize.descent import descend, solve_scales, sweep
from xinslm.quantize.gptq import Hessian, factorise, feed_back_errors


def problem(rows=24, columns=96, tokens=400, seed=0):
    """Weights, GPTQ's codes and scales for them, and the damped Hessian."""
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


def swept(weight, codes, scales, hessian):
    """Codes after one sweep; what it says of H (W - Q)^T is checked."""
    chosen = codes.T.float()
    pull = hessian @ (weight - decode(codes, scales)).T
    sweep(pull, chosen, scales.T.contiguous(), hessian)
    found = chosen.T.to(torch.int8)
    expected = hessian @ (weight - decode(found, scales)).T
    torch.testing.assert_close(pull, expected, rtol=1e-3, atol=1e-3)
    return found


def test_a_sweep_is_exact_coordinate_descent():
    """Each code against all 16, one column after another, by the loss itself in float64."""
    weight, codes, scales, factor = problem(rows=4, columns=64)
    hessian, expected = factor.damped(), codes.clone()
    for column in range(64):
        tries = []
        for code in range(-8, 8):
            other = expected.clone()
            other[:, column] = code
            tries.append(losses(weight, other, scales, hessian))
        expected[:, column] = torch.stack(tries).argmin(0).to(torch.int8) - 8
    found = swept(weight, codes, scales, hessian)
    assert torch.equal(found, expected) and not torch.equal(found, codes)


def test_scales_are_the_least_squares_solution():
    """Against a normal least-squares problem, whose rows are those of a Cholesky factor."""
    weight, codes, scales, factor = problem()
    hessian = factor.damped()
    root = torch.linalg.cholesky(hessian.double())
    target = hessian @ weight.T
    found = solve_scales(target, codes.T.float(), scales.T, hessian).T
    for row, (target, code) in enumerate(zip(weight.double(), codes.double(), strict=True)):
        by_scale = torch.stack(
            [torch.cat([code[32 * g :][:32] * (g == k) for g in range(3)]) for k in range(3)]
        )
        solution = torch.linalg.lstsq((by_scale @ root).T, (target @ root)[:, None]).solution
        expected = storable(solution[:, 0].float())
        torch.testing.assert_close(found[row], expected, rtol=2**-7, atol=0)
    assert torch.equal(storable(found), found)


@pytest.mark.parametrize("seed", range(3))
def test_no_row_gets_worse_and_all_together_better(seed):
    weight, codes, scales, factor = problem(seed=seed)
    hessian = factor.damped()
    better = descend(weight, codes, scales, hessian)
    before, after = (losses(weight, *x, hessian) for x in ((codes, scales), better))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.97 * before.sum()
    assert better[0].min() >= -8 and better[0].max() <= 7 and better[0].dtype == torch.int8
    assert torch.equal(storable(better[1]), better[1])


def test_it_ends_near_the_best_of_all_codes():
    """One block of a row with 4 columns that matter: all 16^4 codes are tried."""
    generator = torch.Generator().manual_seed(1)
    root = torch.zeros(32, 32)
    root[:4, :4] = torch.randn(4, 4, generator=generator)
    hessian = root @ root.T + 1e-6 * torch.eye(32)
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.randn(4, generator=generator)
    scales = fit_scales(weight, Q4_0)
    codes = encode(weight, scales, Q4_0)
    tries = torch.zeros(16**4, 32, dtype=torch.int8)
    tries[:, :4] = torch.tensor(list(itertools.product(range(-8, 8), repeat=4)))
    best = losses(weight, tries, scales.expand(len(tries), 1), hessian).min()
    found = swept(weight, codes, scales, hessian)
    first, last = (float(losses(weight, x, scales, hessian)[0]) for x in (codes, found))
    assert float(best) <= last * (1 + 1e-6) and last <= first


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
