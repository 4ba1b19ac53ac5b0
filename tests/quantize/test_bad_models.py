"""Models and text that quantization could turn into a silently wrong file."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import save_dataset, save_random_model
from xinslm.errors import XinslmError
from xinslm.model.files import load_model, read_tensors
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run
from xinslm.tokenizer.load import load_tokenizer

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
FEATURES = [3, 17, 40]


def make(root, change=None, **shape):
    """A model and a dataset; `change` edits the dictionary of its weights."""
    save_random_model(root / "model", **shape)
    save_dataset(root / "data", load_tokenizer(root / "model").fingerprint())
    file = root / "model" / "model.safetensors"
    tensors = load_file(file)
    if change is not None:
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def quantize(root, output="q", **changes):
    values = {"num_calibration_samples": 12, "max_seq_length": 96} | changes
    return run(QuantizeConfig(root / "model", root / output, root / "data", **values))


def names(root):
    return sorted(path.name for path in root.iterdir())


def layers(root, output="q"):
    return json.loads((root / output / "manifest.json").read_text())["layers"]


@pytest.mark.parametrize("method", ["gptaq", "gptq"])
@pytest.mark.parametrize(
    ("stems", "where"),
    [
        (("gate_proj", "up_proj"), "model.layers.0.mlp.down_proj"),
        (("v_proj",), "model.layers.0.self_attn.o_proj"),
    ],
    ids=["infinite", "too large to square"],
)
def test_activations_that_are_not_finite_are_named(tmp_path, method, stems, where):
    def change(tensors):
        for name in tensors:
            if name.startswith("model.layers.0") and name.split(".")[-2] in stems:
                tensors[name] *= 1e25

    make(tmp_path, change)
    with pytest.raises(XinslmError, match=f"the inputs of {where} are NaN, infinite or too large"):
        quantize(tmp_path, method=method)
    assert names(tmp_path) == ["data", "model"]
    run(QuantizeConfig(tmp_path / "model", tmp_path / "q", method="rtn"))


def test_outputs_of_the_last_layer_that_are_not_finite_are_named(tmp_path):
    """No Hessian comes after them. The inputs of down_proj are finite, and so are their squares."""

    def change(tensors):
        for stem, factor in (("up_proj", 1e15), ("down_proj", 1e25)):
            tensors[f"model.layers.1.mlp.{stem}.weight"] *= factor

    make(tmp_path, change)
    with pytest.raises(XinslmError, match=r"the outputs of layer 1 are NaN or infinite"):
        quantize(tmp_path, method="gptq")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"target_size": "80KB"}, "--target-size"), ({"scale_steps": 2}, "--scale-steps")],
    ids=["target size", "scale steps"],
)
def test_predictions_that_are_not_finite_are_named(tmp_path, changes, option):
    make(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    with pytest.raises(XinslmError, match=f"predictions are NaN or infinite, and {option}"):
        quantize(tmp_path, method="gptq", **changes)
    assert not (tmp_path / "q").exists()


def test_an_untied_head_under_a_tied_configuration_is_refused(tmp_path):
    make(tmp_path, lambda tensors: tensors.update({HEAD: tensors[TABLE] * 1.5}))
    for changes in ({}, {"method": "rtn"}, {"bits": 8}):
        with pytest.raises(XinslmError, match=r"ties the LM head .* another 'lm_head\.weight'"):
            quantize(tmp_path, **changes)
    assert names(tmp_path) == ["data", "model"]


def test_a_second_copy_of_a_tied_head_is_the_embedding(tmp_path):
    make(tmp_path)
    quantize(tmp_path, "without")
    make_copy = load_file(tmp_path / "model" / "model.safetensors")
    make_copy[HEAD] = make_copy[TABLE].clone()
    save_file(make_copy, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    quantize(tmp_path, "with")
    files = [tmp_path / name / "quantized.safetensors" for name in ("without", "with")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", [HEAD, "model.layers.1.mlp.down_proj.weight"])
def test_missing_weights_are_found_before_the_work(tmp_path, name):
    make(tmp_path, lambda tensors: tensors.pop(name), tie_word_embeddings=False)
    seen = []
    config = QuantizeConfig(
        tmp_path / "model",
        tmp_path / "q",
        tmp_path / "data",
        num_calibration_samples=12,
        max_seq_length=96,
    )
    with pytest.raises(XinslmError, match=f"weights are missing, the first is '{name}'"):
        run(config, seen.append)
    assert seen == [] and names(tmp_path) == ["data", "model"]


def test_padding_rows_of_the_vocabulary_are_kept(tmp_path):
    """384 rows, a tokenizer of 320 ids; the rows beyond are all zero, as other programs pad."""

    def change(tensors):
        tensors[TABLE][320:] = 0

    tensors = make(tmp_path, change, vocab_size=384)
    quantize(tmp_path)
    found = load_model(tmp_path / "q").model.embed_tokens.weight
    assert found.shape == (384, 64) and torch.equal(found[320:], torch.zeros(64, 64))
    largest = tensors[TABLE].abs().max()
    assert (found - tensors[TABLE]).abs().max() < largest / 127


@pytest.mark.parametrize("method", ["gptaq", "gptq"])
def test_one_calibration_row_is_never_worse_than_rounding(tmp_path, method):
    make(tmp_path)
    result = quantize(tmp_path, method=method, num_calibration_samples=1)
    assert len(layers(tmp_path)) == 14 and result.loss_ratio <= 1
    for name, layer in layers(tmp_path).items():
        assert math.isfinite(layer["loss"]) and layer["loss"] <= layer["rtn_loss"], name
    hidden = load_model(tmp_path / "q").hidden(torch.tensor([[1, 2, 3]]))
    assert torch.isfinite(hidden).all()


def test_features_that_no_input_has_are_rounded_not_dropped(tmp_path):
    """A norm without gain at some features: those columns of q, k and v are dead."""

    def change(tensors):
        tensors["model.layers.0.input_layernorm.weight"][FEATURES] = 0

    tensors = make(tmp_path, change)
    quantize(tmp_path)
    stored = dict(read_tensors(tmp_path / "q"))
    for stem in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{stem}.weight"
        error = (stored[name] - tensors[name])[:, FEATURES]
        assert error.square().mean() < 0.05 * tensors[name][:, FEATURES].square().mean()
        assert layers(tmp_path)[name.removesuffix(".weight")]["method"] == "gptq"


def test_rows_that_no_grid_fits_stay_as_they_are_in_a_calibrated_run(tmp_path):
    """A scale beyond float16, and one far below: both matrices come out exactly, with a note."""
    big, small = "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[big] *= 1e7
        tensors[small] *= 1e-8

    tensors = make(tmp_path, change)
    result = quantize(tmp_path)
    stored = dict(read_tensors(tmp_path / "q"))
    assert torch.equal(stored[big], tensors[big]) and torch.equal(stored[small], tensors[small])
    assert any("float16 scales cannot hold" in note for note in result.notes)
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
