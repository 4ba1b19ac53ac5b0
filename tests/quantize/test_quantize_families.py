"""Qwen2, Qwen3 and LLaMA with biases through training, GPTQ, mixed widths and trained scales."""

import json

import numpy as np
import pytest
import torch

from small_models import FAMILIES, save_dataset, save_random_model
from xinslm.commands import run
from xinslm.distill.config import DistillConfig
from xinslm.model.files import load_model, open_model, read_tensors
from xinslm.quantize.calibration import read_rows
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.gptq import layer_loss
from xinslm.tokenizer.load import load_tokenizer

ROWS, LENGTH = 16, 64


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A random model, and a dataset with its tokenizer."""
    root = tmp_path_factory.mktemp("families")
    save_random_model(root / "model", **FAMILIES[request.param])
    tokenizer = load_tokenizer(root / "model")
    tokenizer.save(save_dataset(root / "data", tokenizer.fingerprint()) / "tokenizer")
    return root


def options(folder, output, **changes):
    values = {"num_calibration_samples": ROWS, "max_seq_length": LENGTH, "method": "gptq"}
    return QuantizeConfig(folder / "model", output, folder / "data", **(values | changes))


def inputs_of(model, name, batches):
    """Inputs of one linear, from each document on its own."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for batch in batches:
            for ids, segments in zip(batch.input_ids, batch.segments, strict=True):
                for segment in range(segments.max() + 1):
                    model.hidden(torch.from_numpy(ids[segments == segment])[None])
    handle.remove()
    return torch.cat(seen)


def test_recorded_losses_are_those_of_the_finished_model(folder, tmp_path):
    """Biases and norms of heads act in the calibration as they do in the model."""
    run(options(folder, tmp_path / "q"))
    model, original = load_model(tmp_path / "q"), dict(read_tensors(folder / "model"))
    fingerprint = load_tokenizer(folder / "model").fingerprint()
    batches = read_rows(folder / "data", fingerprint, model.config, ROWS, LENGTH, 0)[0]
    layers = json.loads((tmp_path / "q" / "manifest.json").read_text())["layers"]
    assert len(layers) == 14
    for name in ("0.self_attn.o_proj", "1.self_attn.k_proj", "1.self_attn.o_proj"):
        stem = f"model.layers.{name}"
        x = inputs_of(model, stem, batches).double()
        weight = model.get_submodule(stem).weight.detach()
        found = layer_loss(original[f"{stem}.weight"], weight, (x.T @ x / len(x)).float())
        assert float(found) == pytest.approx(layers[stem]["loss"], rel=1e-3), name


def test_mixed_widths_and_trained_scales(folder, tmp_path):
    config = options(folder, tmp_path / "q", method="gptaq", target_size="80KB", scale_steps=2)
    run(config)
    source = open_model(tmp_path / "q")
    assert {"q4_0", "q8_0", "f32"} == set(source.formats.values())
    original = dict(read_tensors(folder / "model"))
    assert source.formats.keys() == original.keys()
    for name, weight in read_tensors(tmp_path / "q"):
        assert weight.dim() > 1 or torch.equal(weight, original[name]), name
    assert load_model(tmp_path / "q", activations="int8").int8_layers == (15, 15)


def test_training_moves_every_weight_and_keeps_the_family(folder, tmp_path):
    config = DistillConfig(
        data_path=folder / "data",
        output_dir=tmp_path / "run",
        teacher=str(folder / "model"),
        init_from=folder / "model",
        max_steps=2,
        max_seq_length=LENGTH,
        batch_size=4,
        device="cpu",
        compute_dtype="float32",
        quantization_aware=True,
    )
    run(config)
    before, after = (dict(read_tensors(path)) for path in (folder / "model", tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert open_model(tmp_path / "run").config == open_model(folder / "model").config
    assert np.isfinite(sum(float(weight.abs().sum()) for weight in after.values()))
