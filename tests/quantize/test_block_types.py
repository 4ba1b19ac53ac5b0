"""GPTAQ on Q4_K and Q5_0 against the method it speeds up, against llama.cpp's own fitting, and on
inputs made to break it.
"""

import ctypes

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from ggml import library, pointer
from linear_layers import correlated_inputs, weights
from xinslm.model.q4_k import Q4K, fit_q4_k
from xinslm.quantize.block_types import Q50, block_type, fit_linear, fit_nearest
from xinslm.quantize.gptq import Hessian, factorise, feed_back_errors, layer_loss

KINDS = {"Q4_K": Q4K, "Q5_0": Q50}


def hessian_of(inputs):
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian.mean()


def optimal_brain_quantization(weight, levels, hessian, factor):
    """Fix columns in order; after each, move the rest to the optimum given what is fixed (float64,
    explicit inverses).
    """
    weight, steps, offsets = (x.double().clone() for x in (weight, levels.steps, levels.offsets))
    identity = torch.eye(len(hessian), dtype=torch.float64)
    damped = hessian + factor.damping * hessian.diagonal().mean() * identity
    codes, free = torch.zeros_like(weight), factor.order.tolist()
    while free:
        column = free[0]
        inverse = torch.linalg.inv(damped[free][:, free])
        step, offset = steps[:, column // 32], offsets[:, column // 32]
        codes[:, column] = ((weight[:, column] + offset) / step).round().clamp(0, 15)
        error = weight[:, column] - (codes[:, column] * step - offset)
        weight[:, free] -= torch.outer(error, inverse[0] / inverse[0, 0])
        free.pop(0)
    return codes


def test_equals_the_naive_method():
    hessian = hessian_of(correlated_inputs(2000, 256))
    factor, weight = factorise(hessian.clone()), weights(6, 256) + 0.03
    levels = fit_q4_k(weight, factor.importance)
    found = feed_back_errors(weight, levels.steps, factor, levels.grid, levels.offsets)
    expected = optimal_brain_quantization(weight, levels, hessian, factor)
    assert found.dtype == torch.int8 and (found == expected).float().mean() > 0.999
    assert (found != levels.codes).float().mean() > 0.1


def by_llama_cpp(weight, kind, importance):
    """Values of llama.cpp's own fitting with its importance matrix."""
    kind = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    blocks = np.zeros((rows, columns // block * block_bytes), np.uint8)
    values, importance = weight.numpy(), importance.float().numpy()
    library().ggml_quantize_chunk.restype = ctypes.c_size_t
    library().ggml_quantize_chunk(
        ctypes.c_int(kind),
        pointer(values),
        pointer(blocks),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        pointer(importance),
    )
    return torch.from_numpy(quants.dequantize(blocks, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrated_layer_is_far_below_the_fitting_of_llama_cpp(kind):
    hessian = hessian_of(correlated_inputs(3000, 256))
    factor, weight = factorise(hessian.clone()), weights(48, 256)
    fitted = fit_linear(weight, KINDS[kind], factor)
    assert fitted.method == "gptq" and fitted.loss < 0.6 * fitted.rtn_loss
    theirs = by_llama_cpp(weight, kind, hessian.diagonal())
    assert fitted.loss < 0.6 * layer_loss(weight, theirs, factor.hessian)
    # the loss is that of the stored values on the inputs
    error = (fitted.coded.decode() - weight) @ correlated_inputs(3000, 256).T
    assert fitted.loss == pytest.approx(float(error.square().sum()) / 3000, rel=1e-3)
    values = quants.dequantize(fitted.coded.pack(), GGMLQuantizationType[kind])
    assert np.array_equal(values, fitted.coded.decode().numpy())


def dead_columns():
    inputs = correlated_inputs(600, 256)
    inputs[:, ::5] = 0
    return inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "inputs",
    [
        dead_columns(),
        correlated_inputs(1, 256),
        correlated_inputs(1, 256).expand(500, -1),
        torch.ones(300, 256),
        correlated_inputs(300, 256) * 1e-12,
        correlated_inputs(300, 256) * 1e12,
    ],
    ids=["dead columns", "one token", "one token repeated", "equal columns", "tiny", "huge"],
)
def test_awkward_inputs_give_finite_codes_never_worse_than_nearest(inputs, kind):
    factor, weight = factorise(hessian_of(inputs)), weights(8, 256)
    fitted = fit_linear(weight, KINDS[kind], factor)
    assert torch.isfinite(fitted.coded.decode()).all()
    assert (fitted.coded.decode() - weight).square().sum() < 0.05 * weight.square().sum()
    if factor is not None:
        nearest = layer_loss(weight, fit_nearest(weight, KINDS[kind]).decode(), factor.hessian)
        assert fitted.loss <= nearest * (1 + 1e-6) == pytest.approx(fitted.rtn_loss, rel=1e-5)


def test_the_nearest_is_kept_where_feedback_does_worse(monkeypatch):
    monkeypatch.setattr(
        "xinslm.quantize.block_types.feed_back_errors",
        lambda weight, *_: torch.zeros_like(weight, dtype=torch.int8),
    )
    factor, weight = factorise(hessian_of(correlated_inputs(600, 256))), weights(8, 256)
    for kind in KINDS.values():
        fitted = fit_linear(weight, kind, factor)
        assert fitted.method == "rtn" and fitted.loss == fitted.rtn_loss
        assert torch.equal(fitted.coded.decode(), fit_nearest(weight, kind).decode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e12, 1e-12])
def test_what_no_scale_holds_is_refused(kind, value):
    with pytest.raises(ValueError, match="values that"):
        fit_nearest(torch.full((4, 256), value), KINDS[kind])


def test_widths():
    found = [block_type(columns) for columns in (256, 1536, 576, 64, 172, 16)]
    assert found == [Q4K, Q4K, Q50, Q50, None, None]
