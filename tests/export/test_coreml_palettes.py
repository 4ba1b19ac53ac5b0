"""Core ML packages for the Neural Engine: palettes, fixed shapes, what they cost, what is refused.

coremltools predicts only on macOS, so the program's operations run in `mil.py`.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import save_dataset, save_quantized, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import NEURAL_ENGINE, CoremlConfig
from xinslm.export.coreml import run as coreml
from xinslm.export.coreml.neural_engine import TOKENS, fixed_mask
from xinslm.model.files import load_model, open_model
from xinslm.model.source import weight_shapes
from xinslm.tokenizer.load import load_tokenizer

IDS = torch.from_numpy(np.random.default_rng(0).integers(5, 320, (1, 25)))
LENGTH = 64


def config(model: Path, out: Path, **changes) -> CoremlConfig:
    return CoremlConfig(
        model, out, **({"compute_units": NEURAL_ENGINE, "max_seq_length": LENGTH} | changes)
    )


def program(folder: Path, wide: bool = False):
    from mil import Program

    return Program(folder / coreml.PACKAGE, wide)


def predict(run, ids, cuts=(16, 17, 18)):
    """Logits of a text that is given in parts: a prompt, then single tokens, then the rest."""
    parts = []
    for start, stop in pairwise([0, *cuts, ids.shape[1]]):
        filled = torch.full((1, TOKENS), 9)
        filled[:, : stop - start] = ids[:, start:stop]
        logits = run(
            inputIds=filled,
            fullAttentionMask=fixed_mask(stop - start, start, LENGTH),
            position=torch.tensor([start], dtype=torch.int32),
        )
        parts.append(logits[:, : stop - start])
    return torch.cat(parts, dim=1).float()


def stored_weights(folder: Path) -> dict[str, np.ndarray]:
    """Palettes of a package as coremltools' loader reads them, one group after another."""
    found = {}
    for op in program(folder).function.operations:
        if op.op_type == "constexpr_lut_to_dense":
            indices, tables = op.indices.val, op.lut.val
            assert tables.dtype == np.float16 and tables.shape[1:-2] == (1, 1, 1)
            tables = tables.reshape(len(tables), -1)
            rows = np.split(indices.reshape(len(indices), -1).astype(int), len(tables))
            values = [table[group] for table, group in zip(tables, rows, strict=True)]
            found[op.outputs[0].name.removesuffix("_palettized")] = np.concatenate(values)
    return found


KINDS = {
    "llama": {},
    "norms of heads": {"qk_norm": True, "num_hidden_layers": 1},
    "biases, untied": {
        "attention_bias": True,
        "attention_output_bias": True,
        "tie_word_embeddings": False,
        "num_hidden_layers": 1,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    pytest.importorskip("coremltools")
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder / "m", **KINDS[request.param])
    result = coreml.run(config(folder / "m", folder / "out"))
    return folder / "m", folder / "out", result


@torch.no_grad()
def test_the_program_computes_what_the_palettes_say(exported):
    source, folder, result = exported
    model = load_model(source)
    palettes = stored_weights(folder)
    assert len(palettes) == sum(n for kind, n in result.types.items() if "palette" in kind)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            values = torch.from_numpy(palettes.pop(name.replace(".", "_"))).float()
            error = (values - weight).square().sum() / weight.square().sum()
            assert 0 < error < (5e-5 if "embed" in name or "head" in name else 0.012), name
            weight.copy_(values)
    assert not palettes
    expected = model.logits(model.hidden(IDS))
    wide = predict(program(folder, wide=True), IDS)
    # the tables of the rotation and the norms are rounded to float16
    assert (wide - expected).abs().max() < 0.01 * expected.std()
    half = program(folder)
    assert (predict(half, IDS) - expected).abs().max() < 0.05 * expected.std()
    assert half.states["keyCache"].abs().sum() > 0


def test_every_shape_is_fixed_and_all_floats_are_halves(exported):
    from coremltools import utils

    _, folder, result = exported
    spec = utils.load_spec(str(folder / coreml.PACKAGE))
    inputs = {i.name: i.type.multiArrayType for i in spec.description.input}
    assert {n: list(t.shape) for n, t in inputs.items()} == {
        "inputIds": [1, TOKENS],
        "fullAttentionMask": [1, 1, TOKENS, LENGTH],
        "position": [1],
    }
    assert not any(t.WhichOneof("ShapeFlexibility") for t in inputs.values())
    for op in program(folder).function.operations:
        for output in op.outputs if op.op_type != "const" else ():
            assert all(isinstance(size, (int, np.integer)) for size in output.shape), output.name
            assert "fp32" not in str(output.dtype), output.name
    # an inverse has an epsilon that is not small beside float16's numbers
    assert not result.operations.keys() & {"linear", "inverse", "constexpr_blockwise_shift_scale"}


def test_card_and_metadata_say_what_it_is(exported):
    from coremltools import utils

    source, folder, result = exported
    description = utils.load_spec(str(folder / coreml.PACKAGE)).description
    facts = description.metadata.userDefined
    assert facts["xinslm.compute_units"] == "cpuAndNeuralEngine"
    assert facts["xinslm.tokens_per_call"] == str(TOKENS)
    assert all(feature.shortDescription for feature in description.input)
    card = (folder / "README.md").read_text()
    assert "CPU_AND_NE" in card and "not run on a Mac" in card
    count = result.types["4-bit palette"]
    assert count % 7 == 0 and f"{count} palettes of 4 bits: squared error" in card
    assert "unquantized weights" in card
    assert "not run on a Mac" in result.describe() and "4-bit palette" in result.describe()
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_model(source).get_parameter(name).detach()
    stored = torch.from_numpy(stored_weights(folder)[name.replace(".", "_")]).float()
    error = float((stored - weight).square().sum() / weight.square().sum())
    assert result.cost.errors[name] == pytest.approx(error, rel=1e-4)


@torch.no_grad()
def divergence(model: Path, palettes: dict[str, np.ndarray], data: Path) -> float:
    """KL divergence a token from the model, one document of the validation split at a time."""
    original, changed = load_model(model), load_model(model)
    for name, weight in changed.named_parameters():
        if weight.dim() > 1:
            weight.copy_(torch.from_numpy(palettes[name.replace(".", "_")]).float())
    tokens = np.fromfile(data / "validation" / "tokens.bin", "<u2").astype(np.int64)
    edges = np.load(data / "validation" / "documents.npy")
    total, count = 0.0, 0
    for start, stop in pairwise(edges):
        ids = torch.from_numpy(tokens[start : stop - 1])[None]
        p, q = (m.logits(m.hidden(ids)).double().log_softmax(-1) for m in (original, changed))
        total, count = total + float((p.exp() * (p - q)).sum()), count + ids.shape[1]
    return total / count


def test_calibration_lowers_the_divergence_and_the_card_has_it(tmp_path):
    pytest.importorskip("coremltools")
    model = tmp_path / "m"
    save_random_model(model)
    data = save_dataset(tmp_path / "data", load_tokenizer(model).fingerprint())
    options = {"data_path": data, "num_calibration_samples": 10_000}  # more than there are
    result = coreml.run(config(model, tmp_path / "out", **options))
    plain = coreml.run(config(model, tmp_path / "plain"))
    found = [divergence(model, stored_weights(tmp_path / name), data) for name in ("out", "plain")]
    assert found[0] < 0.8 * found[1]
    assert result.cost.divergence.kl == pytest.approx(found[0], rel=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"KL divergence from the unquantized weights {found[0]:.4f} nats" in card
    assert plain.cost.divergence is None and plain.notes == ()
    (note,) = result.notes
    assert "all of them were used" in note and note in card and note in result.describe()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["inputs"]["data"] and manifest["calibration"]


def test_a_quantized_folder_is_rounded_again_and_the_card_says_so(tmp_path):
    pytest.importorskip("coremltools")
    save_quantized(tmp_path, "tied")
    result = coreml.run(config(tmp_path / "q", tmp_path / "out"))
    assert result.cost.was_quantized
    assert "of the quantized weights squared" in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_index_is_found_before_the_folder_is_there(tmp_path, monkeypatch):
    pytest.importorskip("coremltools")
    fit = coreml.fit_palettes
    convert = coreml.convert

    def broken(model, path, palettes):
        palette = palettes["model.layers.0.self_attn.k_proj.weight"]
        before = palette.indices.clone()
        palette.indices[0, :2] ^= 1
        convert(model, path, palettes)
        palette.indices.copy_(before)

    save_random_model(tmp_path / "m", num_hidden_layers=1)
    monkeypatch.setattr(coreml, "convert", broken)
    with pytest.raises(XinslmError, match=r"k_proj.weight, indices: 2 values differ"):
        coreml.run(config(tmp_path / "m", tmp_path / "out"))
    monkeypatch.setattr(coreml, "convert", convert)

    def one_less(*args):
        return {k: v for k, v in fit(*args).items() if "k_proj" not in k}

    def with_one_more(model, path, palettes):
        convert(model, path, palettes | {"model.layers.0.self_attn.k_proj.weight": extra})

    extra = fit(*one_model(tmp_path / "m"))["model.layers.0.self_attn.k_proj.weight"]
    monkeypatch.setattr(coreml, "fit_palettes", one_less)
    monkeypatch.setattr(coreml, "convert", with_one_more)
    with pytest.raises(XinslmError, match=r"k_proj.weight: missing in the Core ML program"):
        coreml.run(config(tmp_path / "m", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def one_model(path: Path):
    source = open_model(path)
    return source, weight_shapes(source.config), 16, [], lambda _: None


def test_rows_that_are_no_whole_groups_stay_in_float16(tmp_path):
    pytest.importorskip("coremltools")
    save_random_model(tmp_path / "m", intermediate_size=72, num_hidden_layers=1)
    result = coreml.run(config(tmp_path / "m", tmp_path / "out"))
    assert result.types == {"4-bit palette": 5, "8-bit palette": 1, "float16": 5}
    smaller = coreml.run(config(tmp_path / "m", tmp_path / "eight", group_size=8))
    assert smaller.types == {"4-bit palette": 7, "8-bit palette": 1, "float16": 3}


def test_what_the_neural_engine_does_not_take_is_named(tmp_path):
    pytest.importorskip("coremltools")
    save_random_model(tmp_path / "m", num_hidden_layers=1)
    model, out = tmp_path / "m", tmp_path / "out"
    with pytest.raises(UsageError, match="max_seq_length is 48, but must be a multiple of 32"):
        coreml.run(config(model, out, max_seq_length=48))
    with pytest.raises(UsageError, match="group_size is 4, but must be 8, 16 or 32"):
        coreml.run(config(model, out, group_size=4))
    with pytest.raises(UsageError, match="group_size has no effect without --compute-units cpu-an"):
        coreml.run(CoremlConfig(model, out, group_size=32))
    with pytest.raises(UsageError, match="data_path has no effect without --compute-units"):
        coreml.run(CoremlConfig(model, out, data_path=tmp_path))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"up_proj.weight' has values beyond float16"):
        coreml.run(config(model, out))
    save_random_model(tmp_path / "narrow", head_dim=16)
    with pytest.raises(UsageError, match=r"heads of 16 numbers.*no multiple of 32.*cpu-and-gpu"):
        coreml.run(config(tmp_path / "narrow", out))
    assert not out.exists()
