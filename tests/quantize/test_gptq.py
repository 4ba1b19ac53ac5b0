"""GPTQ against the method it speeds up (one column at a time, explicit inverses), and on inputs
made to break it.
"""

import pytest
import torch

from linear_layers import correlated_inputs, weights
from xinslm.model.grids import Q4_0, decode, encode, fit_scales
from xinslm.quantize import gptq
from xinslm.quantize.gptq import (
    Hessian,
    factorise,
    feed_back_errors,
    layer_loss,
    quantize_weights,
    round_to_nearest,
)


def quantize_weight(weight, factor):
    return quantize_weights([weight], factor)[0]


def hessian_of(inputs):
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian.mean()


def optimal_brain_quantization(weight, scales, hessian, order, damping):
    """Fix columns in `order`; after each, move the rest to the optimum given what is fixed
    (float64, explicit).
    """
    weight, scales = weight.double().clone(), scales.double()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    codes, free = torch.zeros_like(weight), list(order.tolist())
    while free:
        column = free[0]
        inverse = torch.linalg.inv(damped[free][:, free])
        d = scales[:, column // 32]
        codes[:, column] = (weight[:, column] / d).round().clamp(-8, 7)
        error = weight[:, column] - codes[:, column] * d
        weight[:, free] -= torch.outer(error, inverse[0] / inverse[0, 0])
        free.pop(0)
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [64, 160])
def test_equals_the_naive_method(columns, act_order, monkeypatch):
    """160 columns cross the lazy block of 128."""
    if not act_order:
        monkeypatch.setattr(gptq, "rounding_order", lambda diagonal: torch.arange(len(diagonal)))
    inputs, weight = correlated_inputs(400, columns), weights(6, columns)
    hessian = hessian_of(inputs)
    factor = factorise(hessian)
    scales = fit_scales(weight, Q4_0, factor.importance)
    naive = optimal_brain_quantization(weight, scales, hessian, factor.order, factor.damping)
    ours = feed_back_errors(weight, scales, factor)
    assert (naive == ours).float().mean() > 0.995, "float32 may decide a near-tie otherwise"
    losses = [
        layer_loss(weight, decode(c.to(torch.int8), scales), factor.hessian) for c in (naive, ours)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_matrices_of_the_same_inputs_get_what_each_gets_alone():
    factor = factorise(hessian_of(correlated_inputs(500, 160)))
    matrices = [weights(rows, 160, seed=rows) for rows in (5, 64, 33)]
    together = quantize_weights(matrices, factor)
    for matrix, ours in zip(matrices, together, strict=True):
        alone = quantize_weight(matrix, factor)
        assert (ours.scales == alone.scales).float().mean() > 0.995
        assert (ours.codes == alone.codes).float().mean() > 0.995, "float32 may decide a near-tie"
        assert ours.loss == pytest.approx(alone.loss, rel=1e-2)
        assert ours.rtn_loss == pytest.approx(alone.rtn_loss, rel=1e-5)
    assert quantize_weights([], factor) == []


def test_the_factor_is_the_inverse_hessians(columns=300):
    """300 columns are halved twice; rows of the factor are over their diagonal elements."""
    hessian = hessian_of(correlated_inputs(900, columns))
    factor = factorise(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(damped[factor.order][:, factor.order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    upper = (upper / upper.diagonal()[:, None]).float()
    torch.testing.assert_close(factor.upper, upper, rtol=1e-3, atol=1e-4)


def test_layer_loss_is_the_output_error(columns=100):
    inputs, weight = correlated_inputs(400, columns), weights(7, columns)
    quantized = weight + 0.01 * weights(7, columns, seed=3)
    error = (inputs.double() @ (weight - quantized).double().T).square().sum() / len(inputs)
    loss = layer_loss(weight, quantized, hessian_of(inputs).float())
    assert loss == pytest.approx(float(error), rel=1e-5)


def test_importance_is_the_reciprocal_diagonal_of_the_inverse_in_column_order():
    hessian = hessian_of(correlated_inputs(300, 32))
    factor = factorise(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(factor.importance, (1 / torch.linalg.inv(damped).diagonal()).float())


def test_streaming_equals_one_shot():
    inputs = correlated_inputs(5000, 48)
    hessian = Hessian(48)
    for part in inputs.split([1, 2999, 1500, 500]):
        hessian.add(part)
    exact = inputs.double().T @ inputs.double() / 5000
    assert hessian.tokens == 5000
    assert (hessian.mean() - exact).abs().max() < 1e-6 * exact.abs().max()


def test_beats_rounding_to_nearest_clearly_on_correlated_inputs():
    inputs, weight = correlated_inputs(2000, 128), weights(64, 128)
    result = quantize_weight(weight, factorise(hessian_of(inputs)))
    output_error = (
        (inputs @ (weight - decode(result.codes, result.scales)).T).square().sum(1).mean()
    )
    nearest = round_to_nearest(weight)
    rtn_error = (inputs @ (weight - decode(nearest.codes, nearest.scales)).T).square().sum(1).mean()
    assert result.method == "gptq"
    assert result.loss == pytest.approx(float(output_error), rel=1e-3)
    assert result.rtn_loss == pytest.approx(float(rtn_error), rel=1e-3)
    assert result.loss < 0.5 * result.rtn_loss


def test_act_order_leaves_each_code_with_the_scale_of_its_own_group():
    """Uncorrelated inputs move no error, so any order must give plain rounding, each code in its
    own place.
    """
    hessian = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(0)).double() + 0.1)
    weight = weights(5, 96)
    factor = factorise(hessian)
    assert factor.order.tolist() != list(range(96))
    scales = fit_scales(weight, Q4_0, factor.importance)
    assert torch.equal(feed_back_errors(weight, scales, factor), encode(weight, scales, Q4_0))


def dead_columns():
    inputs = correlated_inputs(300, 64)
    inputs[:, 10:30] = 0
    return inputs


@pytest.mark.parametrize(
    "inputs",
    [
        dead_columns(),
        correlated_inputs(1, 64),
        correlated_inputs(300, 32).repeat(1, 2),
        torch.ones(100, 64),
        torch.zeros(100, 64),
        correlated_inputs(300, 64) * 1e-12,
        correlated_inputs(300, 64) * 1e12,
    ],
    ids=[
        "dead columns",
        "one sample",
        "duplicated columns",
        "constant",
        "all zero",
        "tiny",
        "huge",
    ],
)
def test_awkward_inputs_give_finite_codes_never_worse_than_nearest(inputs):
    weight = weights(16, 64)
    result = quantize_weight(weight, factorise(hessian_of(inputs)))
    quantized = decode(result.codes, result.scales)
    assert torch.isfinite(quantized).all()
    assert (weight - quantized).abs().max() < 1.0
    nearest = round_to_nearest(weight)
    hessian = hessian_of(inputs).float()
    assert layer_loss(weight, quantized, hessian) <= layer_loss(
        weight, decode(nearest.codes, nearest.scales), hessian
    )


def test_dead_columns_are_rounded_not_dropped():
    weight = weights(16, 64)
    result = quantize_weight(weight, factorise(hessian_of(dead_columns())))
    error = (weight - decode(result.codes, result.scales))[:, 10:30]
    assert error.square().mean() < 0.05 * weight[:, 10:30].square().mean()


def indefinite(negative):
    basis = torch.linalg.qr(
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    values = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
    values[0] = negative
    return basis @ torch.diag(values) @ basis.T


def test_damping_climbs_until_the_hessian_is_definite_and_gives_up_in_the_end():
    assert factorise(indefinite(0.1)).damping == 0.01
    assert factorise(indefinite(-0.015)).damping == 0.02
    assert factorise(indefinite(-0.04)).damping == 0.05
    assert factorise(indefinite(-0.9)) is None
    broken = indefinite(0.1)
    broken[3, 4] = torch.nan
    assert factorise(broken) is None
    result = quantize_weight(weights(4, 64), None)
    assert result.method == "rtn" and result.loss is None


def test_nearest_is_kept_where_feedback_does_worse(monkeypatch):
    """A factor of another layer's inputs sends errors to the wrong places; the true loss
    notices. Descent, which would mend it, is left out.
    """
    monkeypatch.setattr(gptq, "descend", lambda wanted, codes, scales, hessian: (codes, scales))
    weight, wrong = weights(16, 64), factorise(hessian_of(correlated_inputs(300, 64, seed=7)))
    right = hessian_of(correlated_inputs(300, 64, seed=8)).float()
    mixed = type(wrong)(right, wrong.order, wrong.upper, wrong.importance, wrong.damping)
    result = quantize_weight(weight, mixed)
    assert result.method == "rtn" and result.loss == result.rtn_loss
