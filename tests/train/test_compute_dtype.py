"""Training in bfloat16: what `auto` chooses, its curve against float32, and what it keeps."""

import json

import pytest
import torch

import training as train
import xinslm.precision
from xinslm.files import read_json
from xinslm.model.config import ModelConfig
from xinslm.model.param_dtype import forget_copies
from xinslm.model.transformer import Transformer
from xinslm.precision import (
    best_seconds,
    compute_dtype,
    float32_setting,
    product_rate,
    round_products,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_bfloat16_where_it_is_faster(world, tmp_path, monkeypatch, fast):
    monkeypatch.setattr(xinslm.precision, "has_fast_bfloat16", lambda device: fast)
    expected = "bfloat16" if fast else "float32"
    train.run(world.pretrain(tmp_path / "run", compute_dtype="auto", max_steps=1))
    assert read_json(tmp_path / "run" / "run.json")["compute_dtype"] == expected
    assert compute_dtype("float32", CPU) is torch.float32
    assert compute_dtype("bfloat16", CPU) is torch.bfloat16


def test_a_continued_run_keeps_the_type_it_began_with(world, tmp_path, monkeypatch):
    def stop_at_4(progress):
        if progress.stage == "pretrain" and progress.done == 4:
            raise RuntimeError("stop")

    config = world.pretrain(tmp_path / "run", compute_dtype="auto")
    monkeypatch.setattr(xinslm.precision, "has_fast_bfloat16", lambda device: True)
    with pytest.raises(RuntimeError):
        train.run(config, stop_at_4)
    monkeypatch.setattr(xinslm.precision, "has_fast_bfloat16", lambda device: False)
    train.run(config)
    whole = world.pretrain(tmp_path / "whole", compute_dtype="bfloat16")
    train.run(whole)
    ours, theirs = (
        [json.loads(line)["loss"] for line in lines.read_text().splitlines() if '"loss"' in line]
        for lines in (tmp_path / "run" / "metrics.jsonl", tmp_path / "whole" / "metrics.jsonl")
    )
    assert ours == theirs


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"param_dtype": "bfloat16"}])
def test_bfloat16_follows_the_float32_curve(world, tmp_path, changes):
    """The difference is far below that of another seed."""
    ends = {}
    for name, more in {
        "float32": {},
        "bfloat16": {"compute_dtype": "bfloat16"},
        "seed": {"seed": 1},
    }.items():
        config = world.distill(tmp_path / name, max_steps=40, eval_steps=40, **changes, **more)
        ends[name] = train.run(config).validation.ce
    assert abs(ends["bfloat16"] - ends["float32"]) < 0.5 * abs(ends["seed"] - ends["float32"])


def test_copies_of_weights_follow_the_weights():
    model = Transformer(ModelConfig(64, 32, 48, 2, 2, 1, 16))
    model.initialise(torch.Generator().manual_seed(0))
    model.compute_dtype = torch.bfloat16
    ids = torch.arange(8)[None]
    before = model.hidden(ids)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    forget_copies(model)
    other = Transformer(model.config)
    other.load_state_dict(model.state_dict())
    other.compute_dtype = torch.bfloat16
    assert torch.equal(model.hidden(ids), other.hidden(ids))
    assert not torch.equal(before, other.hidden(ids))


@pytest.mark.parametrize("parts", [{}, {"attention_bias": True}, {"qk_norm": True}], ids=str)
def test_gradients_in_bfloat16_are_those_of_float32_within_its_rounding(parts):
    model = Transformer(ModelConfig(64, 32, 48, 2, 2, 1, 16, **parts))
    model.initialise(torch.Generator().manual_seed(0))
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        model.zero_grad()
        model.logits(model.hidden(ids)).float().square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, exact in found[0].items():
        assert found[1][name].dtype == torch.float32
        # one shift of all keys changes attention little, so this gradient nearly cancels
        limit = 0.1 if name.endswith("k_proj.bias") else 0.03
        assert (found[1][name] - exact).norm() < limit * exact.norm(), name


def test_rounded_products_are_closer_to_float32_than_a_bfloat16_model():
    model = Transformer(ModelConfig(64, 32, 48, 2, 2, 1, 16)).eval()
    model.initialise(torch.Generator().manual_seed(0))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        exact = model.hidden(ids)
        narrow = Transformer(model.config).eval().bfloat16()
        narrow.load_state_dict(model.state_dict())
        narrow_error = (narrow.hidden(ids).float() - exact).norm()
        round_products(model)
        error = (model.hidden(ids) - exact).norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == float32_setting()
    assert error < 0.5 * narrow_error


def test_the_rate_of_products_is_measured_once():
    assert product_rate(torch.float32, "cpu", 64, 0.01) == product_rate(
        torch.float32, "cpu", 64, 0.01
    )


def test_products_on_one_core_at_first_do_not_decide(monkeypatch):
    spent = 0.0

    def seconds(left: torch.Tensor, right: torch.Tensor) -> float:
        nonlocal spent
        undisturbed = 0.0002 if left.dtype == torch.bfloat16 else 0.0004
        spent += 0.008 if spent < 0.15 else undisturbed
        return 0.008 if spent < 0.15 else undisturbed

    monkeypatch.setattr(xinslm.precision, "product_seconds", seconds)
    types = (torch.bfloat16, torch.float32)
    found = best_seconds(types, "cpu", 8, xinslm.precision.CHOICE_SECONDS)
    assert found == [0.0002, 0.0004]
