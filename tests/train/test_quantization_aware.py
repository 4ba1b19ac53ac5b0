"""Training at 4 bits: the rounding against numpy, the gradient against autograd's straight-through
form, and the quantized folder against the weights that training computed with.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.errors import Interrupted, UsageError
from xinslm.model.files import load_model, open_model, read_tensors
from xinslm.model.grids import storable
from xinslm.model.param_dtype import Linear, forget_copies, round_in_forward, rounded
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.train.config import PretrainConfig
from xinslm.train.run import run as pretrain


def by_hand(weight):
    """One block after another."""
    result = np.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], 32):
            block = weight[row, start : start + 32]
            extreme = max(block, key=abs)
            scale = float(storable(torch.tensor([extreme / -8]))[0])
            codes = np.clip(np.round(block / np.float32(scale)), -8, 7)
            result[row, start : start + 32] = codes * np.float32(scale)
    return result


def test_rounding_is_llama_cpps_rule_and_rounding_twice_changes_nothing():
    torch.manual_seed(0)
    weight = torch.randn(5, 96)
    once = rounded(weight)
    np.testing.assert_array_equal(once.numpy(), by_hand(weight.numpy()))
    assert torch.equal(rounded(once), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_goes_straight_through(dtype):
    torch.manual_seed(0)
    layer = Linear(64, 8, bias=False)
    round_in_forward(layer)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    other, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone()
    weight.requires_grad_()
    out = layer(x)
    copy = rounded(weight.detach()).to(dtype)
    wanted = F.linear(other, copy + (weight.to(dtype) - weight.to(dtype).detach()))
    assert torch.equal(out, F.linear(x, copy))
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


@pytest.mark.parametrize("mode", ["float32", "bfloat16 products", "bfloat16 weights", "4 bits"])
def test_a_bias_is_added_to_any_product(mode):
    torch.manual_seed(0)
    layer, x = Linear(64, 8, bias=True), torch.randn(3, 64)
    plain = Linear(64, 8, bias=False)
    plain.load_state_dict({"weight": layer.weight.detach()})
    for one in (layer, plain):
        one.rounds = mode == "4 bits"
        if mode == "bfloat16 weights":
            one.weight.data = one.weight.data.bfloat16()
    x = x.bfloat16() if mode == "bfloat16 products" else x
    torch.testing.assert_close(layer(x), plain(x) + layer.bias.to(x.dtype), rtol=0, atol=0)
    layer(x).sum().backward()
    assert layer.bias.grad.dtype == torch.float32
    assert torch.equal(layer.bias.grad, torch.full((8,), 3.0))


def test_a_changed_weight_is_rounded_again():
    layer = Linear(32, 4, bias=False)
    round_in_forward(layer)
    x = torch.randn(2, 32)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    forget_copies(layer)
    torch.testing.assert_close(layer(x), 2 * before)


def test_rows_without_blocks_stay_as_they_are():
    layer = Linear(48, 4, bias=False)
    round_in_forward(layer)
    x = torch.randn(2, 48)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("aware")
    settings = {k: v for k, v in world.settings.items() if k in PretrainConfig.__dataclass_fields__}
    config = PretrainConfig(
        data_path=world.data,
        output_dir=root / "run",
        **settings,
        max_steps=6,
        eval_steps=6,
        save_steps=3,
        compute_dtype="float32",
        quantization_aware=True,
    )
    pretrain(config)
    return root, config


def test_quantize_gives_the_weights_that_training_computed_with(trained):
    root, _ = trained
    model = dict(read_tensors(root / "run"))
    result = quantize(QuantizeConfig(root / "run", root / "q4"))  # no calibration text
    manifest = json.loads((root / "q4" / "manifest.json").read_text())
    assert manifest["method"] == "absmax" and "q4_0" in result.describe()
    stored = dict(read_tensors(root / "q4"))
    linears = [name for name in stored if name.endswith("_proj.weight")]
    assert len(linears) == 14
    for name in linears:
        assert torch.equal(stored[name], rounded(model[name])), name
        assert not torch.equal(stored[name], model[name]), name


def test_validation_is_that_of_the_quantized_model(trained, world):
    """The 8-bit embedding is the only difference left."""
    root, _ = trained
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    recorded = [line["validation_ce"] for line in lines if "validation_ce" in line][-1]
    quantize(QuantizeConfig(root / "run", root / "again"))
    nats = {}
    for name in ("run", "again"):
        model = load_model(root / name)
        rows = PackedDataset(open_dataset(world.data).split("validation"), 64)
        batch = rows.batch(np.arange(min(len(rows), 64)))
        labels = torch.from_numpy(batch.labels)
        model.requires_grad_(False)
        hidden = model.hidden(
            *(torch.from_numpy(a) for a in (batch.input_ids, batch.positions, batch.segments))
        )
        logits = model.logits(hidden)[labels >= 0]
        nats[name] = float(F.cross_entropy(logits, labels[labels >= 0]))
    assert nats["again"] == pytest.approx(recorded, abs=1e-3)
    assert abs(nats["run"] - recorded) > 2 * abs(nats["again"] - recorded)


def test_a_continued_run_is_the_same(trained, tmp_path):
    _, config = trained
    part = replace(config, output_dir=tmp_path / "run")

    def stop(progress):
        if progress.stage == "pretrain" and progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        pretrain(part, stop)
    pretrain(part)
    a, b = dict(read_tensors(config.output_dir)), dict(read_tensors(tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_widths_without_blocks_are_refused_or_said(trained, tmp_path):
    config = replace(trained[1], output_dir=tmp_path / "none", hidden_size=48, num_heads=2)
    config = replace(config, num_kv_heads=1, intermediate_size=72)
    with pytest.raises(UsageError, match="none gets 4 bits"):
        pretrain(config)
    part = replace(trained[1], output_dir=tmp_path / "part", intermediate_size=72)
    assert any("2 of 14 linear layers" in warning for warning in pretrain(part).warnings)


def test_the_settings_say_it(trained):
    root, _ = trained
    assert open_model(root / "run").settings["quantization_aware"] == "q4_0"
    with pytest.raises(UsageError, match="compile does not work with quantization_aware"):
        replace(trained[1], compile=True).check()
