"""Trained scales and mixed widths: gradients by autograd, divergences by running both models."""

import json
import math

import gguf
import numpy as np
import pytest
import torch
from test_quantize_run import calibration_batches, divergence, options

from small_models import save_dataset, save_random_model
from xinslm.errors import UsageError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.model.files import load_model, open_model, read_tensors
from xinslm.model.grids import Q4_0, storable
from xinslm.model.param_dtype import Linear
from xinslm.model.quantized import QuantizedSource
from xinslm.quantize import scale_distillation
from xinslm.quantize.config import QuantizeConfig, parse_size
from xinslm.quantize.pipeline import Quantization
from xinslm.quantize.rows import single_rows
from xinslm.quantize.run import run
from xinslm.quantize.scale_distillation import _Scales
from xinslm.quantize.sensitivity import Cost, choose_wide, fit, measure_costs
from xinslm.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("refine")
    save_random_model(root / "model")
    save_dataset(root / "data", load_tokenizer(root / "model").fingerprint())
    run(options(root, root / "plain", method="gptq"))
    return root


def open_folder(path):
    return QuantizedSource(str(path), path)


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_the_gradient_of_a_scale_is_autograds():
    """After two passes, whose gradients add up."""
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scales = storable(torch.randn(6, 2))
    layer = _Scales(Linear(64, 6, bias=False), codes, scales)
    layer.decode()
    other = torch.zeros(6, 2, requires_grad=True)
    plain = ((scales * other.exp())[..., None] * codes.unflatten(1, (2, 32)).float()).flatten(1)
    torch.testing.assert_close(layer.module.weight.detach(), plain.detach(), rtol=0, atol=0)
    for _ in range(2):
        x, by = torch.randn(5, 64), torch.randn(5, 6)
        (layer.module(x) * by).sum().backward()
        ((x @ plain.T) * by).sum().backward(retain_graph=True)
    assert layer.module.weight.grad is None
    torch.testing.assert_close(layer.change.grad, other.grad)


def test_trained_scales_bring_the_model_nearer_and_leave_the_codes(folders):
    rows = {"method": "gptq", "num_calibration_samples": 30}  # all there are
    run(options(folders, folders / "unscaled", **rows))
    result = run(options(folders, folders / "scaled", **rows, scale_steps=30))
    plain, scaled = open_folder(folders / "unscaled"), open_folder(folders / "scaled")
    changed = 0
    for name in plain.names:
        a, b = plain.stored(name), scaled.stored(name)
        assert torch.equal(a.data, b.data), name
        if a.scales is not None:
            assert torch.equal(storable(b.scales.float()), b.scales.float()), name
            changed += int((a.scales != b.scales).sum())
    assert changed > 100
    original = load_model(folders / "model")
    held_out = single_rows(calibration_batches(folders, original.config, 30))[7::8]
    recorded = manifest(folders / "scaled")["scale_distillation"]
    assert recorded["steps"] == 30 and recorded["kl_after"] < 0.97 * recorded["kl_before"]
    for key, folder in (("kl_before", "unscaled"), ("kl_after", "scaled")):
        kl = divergence(original, load_model(folders / folder), held_out)  # rows alike in length
        assert recorded[key] == pytest.approx(kl, rel=1e-2)
    assert "not trained on" in result.describe()
    assert (folders / "scaled" / "quantized.safetensors").stat().st_size == (
        folders / "unscaled" / "quantized.safetensors"
    ).stat().st_size


def test_scales_that_bring_nothing_are_not_kept(folders, monkeypatch):
    monkeypatch.setattr(scale_distillation, "LEARNING_RATE", 3.0)
    result = run(options(folders, folders / "worse", method="gptq", scale_steps=3))
    assert "no gain" in result.describe()
    for name, tensor in read_tensors(folders / "plain"):
        assert torch.equal(tensor, dict(read_tensors(folders / "worse"))[name]), name


def test_costs_are_what_changing_one_matrix_does(folders, monkeypatch):
    """Estimated from gradients of drawn tokens, against running the model with that one matrix at 4
    bits.
    """
    source = open_model(folders / "model")
    original = load_model(folders / "model")
    batches = calibration_batches(folders, original.config)
    quantized = open_folder(folders / "plain")
    sums = {}
    for seed in range(30):
        for stem, cost in measure_costs(source, quantized, batches, seed).items():
            sums[stem] = sums.get(stem, 0) + cost.divergence / 30
    rows = single_rows(batches)
    assert "model.embed_tokens" in sums
    for stem, estimate in sums.items():
        other, name = load_model(folders / "model"), f"{stem}.weight"
        with torch.no_grad():
            weight = other.get_parameter(name)
            is_narrow = quantized.formats[name] == "q4_0"
            weight.copy_(quantized.tensor(name) if is_narrow else fit(weight, Q4_0).dequantize())
        kl = divergence(original, other, rows)
        assert estimate == pytest.approx(kl, rel=0.35), stem


def test_the_best_gain_per_byte_comes_first():
    costs = {
        "a": Cost(3200, 0.1),
        "b": Cost(32_000, 0.5),
        "c": Cost(3200, 0.001),
        "d": Cost(3200, 0.2),
    }
    narrow = sum(cost.weights for cost in costs.values()) // 32 * 18
    assert choose_wide(costs, 1000, narrow + 1000) == []
    assert choose_wide(costs, 1000, narrow + 1000 + 2 * 1600) == ["d", "a"]
    # b does not fit any more, c does
    assert choose_wide(costs, 0, narrow + 3 * 1600) == ["d", "a", "c"]
    assert set(choose_wide(costs, 0, 10**9)) == set("abcd")
    with pytest.raises(UsageError, match="prune the model first"):
        choose_wide(costs, 1000, narrow + 999)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80MB", 80_000_000), ("0.5 GiB", 2**29), ("12345", 12345), ("1.5kb", 1500), ("7 B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "80 apples", "1e9", "nan"])
def test_what_is_no_size(text):
    assert parse_size(text) is None


def stored_bytes(folder):
    source = open_folder(folder)
    weights = [source.stored(name) for name in source.names]
    return sum(
        weight.data.nbytes + (0 if weight.scales is None else weight.scales.nbytes)
        for weight in weights
    )


def test_a_target_size_is_met_and_used(folders):
    original = load_model(folders / "model")
    batches = calibration_batches(folders, original.config)
    everything = options(folders, folders / "wide", method="gptq", target_size="1GB")
    run(everything)
    assert set(open_folder(folders / "wide").formats.values()) == {"q8_0", "f32"}
    assert manifest(folders / "wide")["bits"] == 8 and manifest(folders / "wide")["layers"] == {}
    largest, kl = stored_bytes(folders / "wide"), []
    smallest = int(largest * 0.65)
    for target in (smallest, (smallest + largest) // 2, largest):
        folder = folders / f"size-{target}"
        run(options(folders, folder, method="gptq", target_size=str(target)))
        assert target * 0.93 < stored_bytes(folder) <= target
        kl.append(divergence(original, load_model(folder), batches))
    assert kl[0] > kl[1] > kl[2]
    with pytest.raises(UsageError, match="--target-size is 1,000 bytes"):
        run(options(folders, folders / "no", target_size="1kB"))
    assert not (folders / "no").exists()


def test_a_mixed_folder_is_one_gguf_with_the_same_weights(folders, tmp_path):
    """A 4-bit embedding and 8-bit linears, by gguf's own dequantization."""
    target = int(stored_bytes(folders / "plain") * 0.98)
    run(options(folders, tmp_path / "mixed", method="gptq", target_size=str(target)))
    source = open_folder(tmp_path / "mixed")
    assert {"q4_0", "q8_0"} <= set(source.formats.values())
    export_gguf(GgufConfig(tmp_path / "mixed", tmp_path / "mixed.gguf"))
    kinds = {"q4_0": "Q4_0", "q8_0": "Q8_0", "f32": "F32"}
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    names |= {
        f"blk.{i}.ffn_{part}.weight": f"model.layers.{i}.mlp.{part}_proj.weight"
        for i in range(2)
        for part in ("gate", "up", "down")
    }
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "mixed.gguf").tensors}
    for name, own in names.items():
        tensor = reader[name]
        assert tensor.tensor_type.name == kinds[source.formats[own]]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values, source.tensor(own).numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_size": "many"}, "such as 80MB"),
        ({"target_size": "80MB", "bits": 8}, "--target-size needs 4 bits"),
        ({"scale_steps": 5, "method": "keep"}, "--scale-steps needs 4 bits"),
        ({"scale_steps": 5, "method": "rtn", "data_path": None}, "need text to calibrate on"),
        ({"scale_steps": -1}, "scale_steps is -1"),
        ({"scale_steps": 5, "num_calibration_samples": 4}, "at least 8 calibration rows"),
        ({"target_size": "1kB"}, "--target-size is 1,000 bytes"),
        ({"bits": 8, "method": "gptq"}, "--method gptq is for 4 bits"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_is_left(
    folders, tmp_path, changes, message, monkeypatch
):
    """Before any layer was quantized."""
    monkeypatch.setattr(Quantization, "write", lambda *_: pytest.fail("it began"))
    with pytest.raises(UsageError, match=message):
        run(options(folders, tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_everything_together(folders, tmp_path):
    """Mixed widths, then scales of both kinds of codes; the divergence falls at each step."""
    target = str(int(stored_bytes(folders / "plain") * 1.1))
    rows = {"target_size": target, "num_calibration_samples": 30}
    run(options(folders, tmp_path / "a", **rows))
    run(options(folders, tmp_path / "b", **rows, scale_steps=30))
    recorded = manifest(tmp_path / "b")
    assert recorded["method"] == "gptaq"
    assert recorded["scale_distillation"]["kl_after"] < recorded["scale_distillation"]["kl_before"]
    assert math.isfinite(sum(recorded["kl_of_4_bits"].values()))
    original = load_model(folders / "model")
    batches = calibration_batches(folders, original.config, 30)
    kl = [divergence(original, load_model(tmp_path / n), batches) for n in "ab"]
    assert kl[1] < kl[0]


@pytest.mark.parametrize("option", [{"target_size": "1MB"}, {"scale_steps": 2}])
def test_a_model_without_blocks_is_refused(tmp_path, option):
    sizes = {"hidden_size": 48, "intermediate_size": 72, "head_dim": 12}
    save_random_model(tmp_path / "model", **sizes)
    save_dataset(tmp_path / "data", load_tokenizer(tmp_path / "model").fingerprint())
    with pytest.raises(UsageError, match="has rows in blocks of 32"):
        run(options(tmp_path, tmp_path / "out", **option))
    assert not (tmp_path / "out").exists()


def test_the_manifest_of_kept_codes_says_so(folders, tmp_path):
    run(QuantizeConfig(folders / "plain", tmp_path / "kept", bits=8, method="keep"))
    assert manifest(tmp_path / "kept")["method"] == "keep"
