"""GPTAQ against least squares in float64, and against inputs captured in both finished models."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from test_quantize_run import calibration_batches, divergence, linear_inputs, options

from small_models import save_dataset, save_random_model
from xinslm.model.files import load_model, read_tensors
from xinslm.model.grids import decode
from xinslm.model.transformer import Block
from xinslm.quantize import gptq
from xinslm.quantize.activations import Calibration
from xinslm.quantize.gptq import Hessian, factorise, layer_loss, quantize_weights
from xinslm.quantize.pipeline import Quantization
from xinslm.quantize.run import run
from xinslm.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("gptaq")
    save_random_model(root / "model")
    save_dataset(root / "data", load_tokenizer(root / "model").fingerprint())
    return root


STREAMS = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
"""Which norm reads the residual stream that a linear adds its outputs to."""


def drifting_inputs(tokens=1000, columns=96):
    torch.manual_seed(0)
    original = torch.randn(tokens, 24) @ torch.randn(24, columns) + torch.randn(tokens, columns)
    return original, original * 0.9 + 0.3 * torch.randn(tokens, columns)


def hessian_of(original, inputs):
    hessian = Hessian(inputs.shape[1])
    for start in range(0, len(inputs), 250):  # in chunks, as batches come
        rows = slice(start, start + 250)
        hessian.add(inputs[rows])
        hessian.add_drift(original[rows] - inputs[rows], inputs[rows])
    return hessian


def least_squares(weight, original, inputs, damping):
    """Weights whose outputs on `inputs` are nearest to those of `weight` on inputs halfway to
    `original`, with the damping that pulls towards `weight` itself.
    """
    original = inputs + (original - inputs) / 2
    x, y = inputs.double(), original.double()
    h = x.T @ x / len(x)
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    return weight + weight.double() @ ((y - x).T @ x / len(x)) @ torch.linalg.inv(h)


def test_the_weights_move_to_the_least_squares_solution():
    original, inputs = drifting_inputs()
    hessian = hessian_of(original, inputs)
    factor = factorise(hessian.mean(), hessian.drift())
    weight = torch.randn(32, 96)
    expected = least_squares(weight, original, inputs, factor.damping)
    torch.testing.assert_close(factor.aim(weight).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_outputs_make_up_for_what_the_stream_has_lost():
    """Half of the least-squares solution, as far as the inputs tell."""
    original, inputs = drifting_inputs()
    lost = 0.2 * inputs @ torch.randn(96, 32) + torch.randn(len(inputs), 32)
    hessian = hessian_of(original, inputs)
    for start in range(0, len(inputs), 250):
        rows = slice(start, start + 250)
        hessian.add_stream_drift(lost[rows], inputs[rows])
    factor = factorise(hessian.mean(), hessian.drift())
    weight, x = torch.randn(32, 96), inputs.double()
    h = x.T @ x / len(x)
    h += factor.damping * h.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    expected = least_squares(weight, original, inputs, factor.damping)
    expected = expected + lost.double().T @ x / len(x) @ torch.linalg.inv(h) / 2
    torch.testing.assert_close(factor.aim(weight).double(), expected, rtol=1e-4, atol=1e-4)
    errors = []
    for owed in (factor.owed, None):
        result = quantize_weights([weight], replace(factor, owed=owed))[0]
        outputs = inputs @ decode(result.codes, result.scales).T
        errors.append(float((original @ weight.T + lost - outputs).square().mean()))
    assert errors[0] < errors[1]


def output_errors(original, inputs):
    """Squared errors of a quantized layer's outputs, with the drift and without it."""
    weight = torch.randn(32, 96)
    errors = []
    for with_drift in (True, False):
        hessian = hessian_of(original, inputs)
        factor = factorise(hessian.mean(), hessian.drift() if with_drift else None)
        result = quantize_weights([weight], factor)[0]
        outputs = inputs @ decode(result.codes, result.scales).T
        errors.append(float((original @ weight.T - outputs).square().mean()))
    return errors


def test_outputs_are_nearer_to_the_original_models():
    original, inputs = drifting_inputs()
    errors = output_errors(original, inputs)
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", ["one direction", "duplicated columns", "huge", "dead columns"])
def test_an_awkward_drift_is_never_worse_than_none(kind):
    """Of inputs whose covariance has no inverse, too: the error of the outputs is that of GPTQ, up
    to rounding, or less.
    """
    original, inputs = drifting_inputs()
    if kind == "one direction":
        inputs = original + 0.5 * torch.randn(len(original), 1) @ torch.randn(1, 96)
    elif kind == "duplicated columns":
        original, inputs = (x[:, :48].repeat(1, 2) for x in (original, inputs))
    elif kind == "huge":
        original = inputs + 1e4 * (original - inputs)
    else:
        inputs[:, 10:40] = 0
    errors = output_errors(original, inputs)
    assert errors[0] <= 1.01 * errors[1]


def test_a_drift_that_is_not_finite_is_noticed():
    """The original model can overflow where the quantized one does not."""
    original, inputs = drifting_inputs()
    original[7, 3] = torch.inf
    hessian = hessian_of(original, inputs)
    assert not hessian.is_finite and hessian_of(inputs, inputs).is_finite


def test_drift_is_that_of_the_two_finished_models(folders, monkeypatch):
    """What the pipeline measures for each linear equals captured inputs and residual streams of the
    original model and of the finished quantized one, each document run alone.
    """
    seen = []
    real = gptq.factorise
    monkeypatch.setattr(
        "xinslm.quantize.pipeline.factorise",
        lambda hessian, drift: seen.append((hessian.clone(), drift)) or real(hessian, drift),
    )
    run(options(folders, folders / "drift"))
    quantized, original = load_model(folders / "drift"), load_model(folders / "model")
    batches = calibration_batches(folders, original.config)
    weights = dict(original.named_parameters())
    a, b = (
        linear_inputs(model, batches) | linear_inputs(model, batches, "layernorm")
        for model in (original, quantized)
    )
    firsts = [name for name in a if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))]
    assert len(firsts) == len(seen) == 8
    recorded = json.loads((folders / "drift" / "manifest.json").read_text())["layers"]
    stored = dict(read_tensors(folders / "drift"))
    for name, (hessian, drift) in zip(firsts, seen, strict=True):
        x = b[name].double()
        torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        expected = (a[name].double() - x).T @ x / len(x)
        torch.testing.assert_close(drift.inputs.double(), expected, rtol=1e-3, atol=1e-5)
        factor = real(hessian, drift)
        wanted = least_squares(weights[f"{name}.weight"].detach(), a[name], b[name], factor.damping)
        if stream := STREAMS.get(name.rpartition(".")[2]):
            norm = ".".join((*name.split(".")[:3], stream))
            lost = (a[norm].double() - b[norm].double()).T @ x / len(x)
            torch.testing.assert_close(drift.stream.double(), lost, rtol=1e-3, atol=1e-5)
            damped = hessian.clone()
            damped.diagonal().add_(factor.damping * hessian.diagonal().mean())
            wanted += lost @ torch.linalg.inv(damped) / 2
        assert (drift.stream is None) == (stream is None), name
        loss = layer_loss(wanted.float(), stored[f"{name}.weight"], hessian.float())
        assert recorded[name]["loss"] == pytest.approx(loss, rel=1e-2), name
        assert recorded[name]["loss"] <= recorded[name]["rtn_loss"], name


def test_few_tokens_are_not_trusted(folders, monkeypatch):
    """With fewer than 8 tokens for each column, the codes are GPTQ's, a note says so, and the
    original model does not run along for nothing.
    """
    made = []
    real = Calibration.__init__

    def counted(self, *args):
        real(self, *args)
        made.append(len(self.streams))

    monkeypatch.setattr(Calibration, "__init__", counted)
    rows = {"num_calibration_samples": 2}
    result = run(options(folders, folders / "few", **rows))
    assert any("too few for GPTAQ" in note for note in result.notes)
    assert made == [1]
    run(options(folders, folders / "few-gptq", method="gptq", **rows))
    other = dict(read_tensors(folders / "few-gptq"))
    for name, tensor in read_tensors(folders / "few"):
        assert torch.equal(tensor, other[name]), name


def test_the_model_is_nearer_to_the_original(folders):
    original = load_model(folders / "model")
    batches = calibration_batches(folders, original.config)
    kl = []
    for method in ("gptaq", "gptq"):
        run(options(folders, folders / method, method=method))
        kl.append(divergence(original, load_model(folders / method), batches))
    assert kl[0] < kl[1]


def test_one_block_at_a_time_is_in_memory(folders, monkeypatch):
    """When a block begins, no matrix of the one before lives on."""
    alive, seen = weakref.WeakSet(), []
    layer = Quantization._layer

    def counted(self, index, out):
        gc.collect()
        seen.append(len(alive))
        layer(self, index, out)

    def made(*arguments):
        block = Block(*arguments)
        alive.add(block)
        return block

    monkeypatch.setattr(Quantization, "_layer", counted)
    monkeypatch.setattr("xinslm.quantize.activations.Block", made)
    run(options(folders, folders / "memory"))
    assert seen == [0, 0]
