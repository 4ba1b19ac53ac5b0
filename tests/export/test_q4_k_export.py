"""`export gguf --outtype q4_k`: codes that the export chooses, as llama.cpp reads them."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

from llama_cpp import LlamaCpp
from small_models import save_dataset, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export import gguf_tensors
from xinslm.export.config import GgufConfig
from xinslm.export.cost import divergence, held_out_rows
from xinslm.export.gguf import run
from xinslm.model.files import load_model, open_model
from xinslm.model.k_quants import SUPER_BLOCK
from xinslm.quantize import gptq
from xinslm.quantize.block_types import Q50
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.tokenizer.load import load_tokenizer

WIDTHS = {
    "fits": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "ffn alone fits": {"intermediate_size": 256},
    "nothing fits": {"intermediate_size": 160},
}
TYPES = {
    "fits": {"Q4_K": 7, "Q8_0": 1, "F32": 3},
    "ffn alone fits": {"Q5_0": 6, "Q4_K": 1, "Q8_0": 1, "F32": 3},
    "nothing fits": {"Q5_0": 7, "Q8_0": 1, "F32": 3},
}
FILE_TYPES = {"fits": 14, "ffn alone fits": 8, "nothing fits": 8}
"""MOSTLY_Q4_K_S and MOSTLY_Q5_0 of llama.h."""


def config(model, out, **changes):
    return GgufConfig(model, out, outtype="q4_k", **changes)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(5, 320, length).tolist()


@pytest.fixture(scope="module", params=WIDTHS)
def exported(request, tmp_path_factory):
    """A model of one layer, its dataset, and the calibrated file."""
    root = tmp_path_factory.mktemp("q4k")
    save_random_model(root / "model", num_hidden_layers=1, **WIDTHS[request.param])
    tokenizer = load_tokenizer(root / "model").fingerprint()
    save_dataset(root / "data", tokenizer, documents=120)
    calibrated = {"data_path": root / "data", "num_calibration_samples": 24}
    result = run(config(root / "model", root / "m.gguf", **calibrated))
    return request.param, root, result


def test_types_and_metadata(exported):
    name, root, result = exported
    reader = GGUFReader(root / "m.gguf")
    found = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    assert dict(found) == result.types == TYPES[name]
    assert reader.fields["general.file_type"].contents() == FILE_TYPES[name]
    assert reader.fields["general.quantization_version"].contents() == 2
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q4_K":
            assert tensor.shape[0] % SUPER_BLOCK == 0
    assert len(reader.fields["xinslm.calibration"].contents()) > 10
    assert open_model(root / "m.gguf").calibration
    width = 160 if name == "nothing fits" else 64
    says = f"rows of {width} are no multiple of 256: Q5_0, 5.5 bits a weight"
    assert (says in result.describe()) == (name != "fits")


def test_llama_cpp_has_the_probabilities_of_the_decoded_weights(exported):
    """It rounds the inputs of each linear to 8 bits, in blocks of 256 or 32."""
    _, root, _ = exported
    model, original = load_model(root / "m.gguf"), load_model(root / "model")
    sums = torch.zeros(2, dtype=torch.float64)
    with LlamaCpp(root / "m.gguf") as llama, torch.no_grad():
        for seed in range(3):
            ids = torch.tensor([prompt(40, seed)])
            ours, before = (
                m.logits(m.hidden(ids))[0, -1].double().log_softmax(-1) for m in (model, original)
            )
            theirs = torch.from_numpy(llama.next_logprobs(ids[0].tolist(), 320))
            assert torch.isfinite(theirs).all()
            kl = (ours.exp() * (ours - theirs)).sum()
            assert kl < 0.01
            sums += torch.stack((kl, (before.exp() * (before - theirs)).sum()))
    assert sums[0] < 0.1 * sums[1], "the weights are those of the file, not the model's"


def test_the_card_has_the_figures(exported):
    name, root, result = exported
    card = (root / "m.gguf.md").read_text()
    assert result.written == (root / "m.gguf.md",)
    assert "codes chosen by GPTAQ with 24 rows of 128 tokens of data; layer loss 0." in card
    assert "KL divergence from the unquantized weights 0." in card
    assert ("matrices of Q4_K: squared error" in card) == (name != "nothing fits")
    assert ("matrices of Q5_0: squared error" in card) == (name != "fits")
    assert "llama-cli -m m.gguf" in card and "Ollama" not in card
    for line in result.measured:
        assert f"- {line}" in card and f"cost    {line}" in result.describe()
    assert "values are those of the codes that were chosen" in result.describe()
    assert all(f"- {note}" in card for note in result.notes)


def kl_to_original(root, file):
    model, original = load_model(file), load_model(root / "model")
    split = np.fromfile(root / "data" / "validation" / "tokens.bin", "<u2")
    ids = torch.from_numpy(split[:120].astype(np.int64))[None]
    with torch.no_grad():
        p, q = (m.logits(m.hidden(ids)).double().log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_calibration_brings_the_file_nearer_to_the_model(exported, tmp_path):
    _, root, _ = exported
    result = run(config(root / "model", tmp_path / "rtn.gguf"))
    card = (tmp_path / "rtn.gguf.md").read_text()
    assert "rounded to nearest, without calibration text" in card and "KL" not in card
    assert result.types == run_types(root / "m.gguf")
    assert "xinslm.calibration" not in GGUFReader(tmp_path / "rtn.gguf").fields
    assert kl_to_original(root, root / "m.gguf") < 0.9 * kl_to_original(root, tmp_path / "rtn.gguf")


def run_types(path):
    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose rows all fit, of one layer."""
    root = tmp_path_factory.mktemp("wide")
    save_random_model(root / "model", num_hidden_layers=1, **WIDTHS["fits"])
    return root / "model"


@pytest.mark.parametrize("kind", ["q6_k", "f16"])
def test_the_table_has_the_type_that_is_asked_for(model, tmp_path, kind):
    result = run(config(model, tmp_path / "m.gguf", embedding_type=kind))
    assert result.types == {"Q4_K": 7, kind.upper(): 1, "F32": 3}


def test_biases_an_untied_head_and_norms_of_heads(tmp_path):
    for name, changes in {
        "qwen2": {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": False},
        "qwen3": {"qk_norm": True},
    }.items():
        save_random_model(tmp_path / name, num_hidden_layers=1, **changes)
        run(config(tmp_path / name, tmp_path / f"{name}.gguf"))
        found, before = load_model(tmp_path / f"{name}.gguf"), load_model(tmp_path / name)
        for key, weight in before.named_parameters():
            error = (found.get_parameter(key) - weight).square().sum() / weight.square().sum()
            assert error < 0.01, key


def change(model, tmp_path, edit):
    """A copy of the model with edited weights."""
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    return tmp_path / "model"


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(("factor", "kind"), [(1e9, "F32"), (1e-12, "F32"), (1e-3, "Q4_K")])
def test_magnitudes_beyond_the_scales_stay_unquantized(model, tmp_path, factor, kind):
    changed = change(model, tmp_path, lambda w: w[f"{UP}.weight"].mul_(factor))
    result = run(config(changed, tmp_path / "m.gguf"))
    (found,) = (t for t in GGUFReader(tmp_path / "m.gguf").tensors if "ffn_up" in t.name)
    assert found.tensor_type.name == kind
    says = f"{UP}: magnitudes that float16 scales cannot hold, kept unquantized"
    assert (says in result.notes) == (kind == "F32")


def test_rows_that_no_block_fits_stay_unquantized(tmp_path):
    save_random_model(tmp_path / "model", num_hidden_layers=1, intermediate_size=172)
    result = run(config(tmp_path / "model", tmp_path / "m.gguf"))
    assert result.types == {"Q5_0": 6, "F16": 1, "Q8_0": 1, "F32": 3}
    assert "rows of 172 are no multiple of 32, kept unquantized" in result.describe()


def test_a_hidden_size_that_no_block_fits(tmp_path):
    save_random_model(tmp_path / "model", num_hidden_layers=1, hidden_size=48)
    result = run(config(tmp_path / "model", tmp_path / "m.gguf"))
    assert result.types == {"F16": 6, "Q5_0": 2, "F32": 3}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_refused_by_name(model, tmp_path, value):
    def broken(weights):
        weights[f"{UP}.weight"][3, 4] = value

    changed = change(model, tmp_path, broken)
    with pytest.raises(XinslmError, match=f"{UP}.weight' holds NaN or infinity"):
        run(config(changed, tmp_path / "m.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_calibration_row_and_dead_columns(model, tmp_path):
    """Row 0 alone has fewer tokens than columns; a norm's zeros make inputs that are always 0."""

    def dead(weights):
        weights["model.layers.0.post_attention_layernorm.weight"][::3] = 0

    changed = change(model, tmp_path, dead)
    data = save_dataset(tmp_path / "data", load_tokenizer(changed).fingerprint())
    calibrated = {"data_path": data, "num_calibration_samples": 1}
    result = run(config(changed, tmp_path / "m.gguf", **calibrated))
    assert result.types == {"Q4_K": 7, "Q8_0": 1, "F32": 3}
    assert "too few for GPTAQ: GPTQ was used" in result.describe()
    found, before = open_model(tmp_path / "m.gguf"), open_model(changed)
    for name in (f"{UP}.weight", "model.layers.0.mlp.down_proj.weight"):
        wanted = before.tensor(name)
        error = (found.tensor(name) - wanted).square().sum() / wanted.square().sum()
        assert 0 < error < 0.05, "dead columns are rounded, not dropped"


def test_rounding_to_nearest_is_kept_where_it_is_better(model, tmp_path, monkeypatch):
    """With codes spoiled after they were chosen, no layer may be worse than the nearest."""
    chosen = gptq.feed_back_errors

    def spoiled(*arguments):
        return chosen(*arguments).roll(1, 0)

    monkeypatch.setattr("xinslm.quantize.block_types.feed_back_errors", spoiled)
    data = save_dataset(tmp_path / "data", load_tokenizer(model).fingerprint())
    calibrated = {"data_path": data, "num_calibration_samples": 8}
    result = run(config(model, tmp_path / "m.gguf", **calibrated))
    says = "and 6 more: GPTQ did not beat rounding to nearest, which was kept"
    assert says in result.describe()
    run(config(model, tmp_path / "rtn.gguf"))
    first, second = (
        {t.name: t.data for t in GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("m", "rtn")
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_quantized_model_is_refused(model, tmp_path):
    quantize(QuantizeConfig(model, tmp_path / "q4", method="rtn"))
    run(config(model, tmp_path / "m.gguf"))
    before = sorted(tmp_path.iterdir())
    for source in ("q4", "m.gguf"):
        with pytest.raises(UsageError, match=f"{source} is quantized already: .*before it was"):
            run(config(tmp_path / source, tmp_path / "again.gguf"))
    assert sorted(tmp_path.iterdir()) == before


def test_bad_requests(model, tmp_path):
    def wrong(**changes):
        return GgufConfig(model, tmp_path / "m.gguf", **changes)

    with pytest.raises(UsageError, match="data_path has no effect without --outtype q4_k"):
        run(wrong(data_path=tmp_path))
    with pytest.raises(UsageError, match="num_calibration_samples has no effect without"):
        run(wrong(outtype="q4_k", num_calibration_samples=3))
    with pytest.raises(UsageError, match="num_calibration_samples"):
        run(wrong(outtype="q4_k", data_path=tmp_path, num_calibration_samples=0))
    other = save_dataset(tmp_path / "other", "another tokenizer")
    with pytest.raises(UsageError, match="tokenizer"):
        run(wrong(outtype="q4_k", data_path=other))
    (tmp_path / "m.gguf.md").write_text("notes of mine")
    with pytest.raises(UsageError, match=r"m\.gguf\.md exists, where the model card goes"):
        run(wrong(outtype="q4_k"))
    assert (tmp_path / "m.gguf.md").read_text() == "notes of mine"
    assert not (tmp_path / "m.gguf").exists()


def test_a_wrong_block_is_found_before_the_file_is_there(model, tmp_path, monkeypatch):
    plain = gguf_tensors.reordered

    def broken(rows, name, shape):
        rows = plain(rows, name, shape)
        if rows.dtype == np.uint8 and "up_proj" in name:
            rows = rows.copy()
            rows[3, 100] ^= 1
        return rows

    monkeypatch.setattr(gguf_tensors, "reordered", broken)
    with pytest.raises(XinslmError, match=r"up_proj.weight: 1 values differ.*nothing is written"):
        run(config(model, tmp_path / "m.gguf"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["quantize", "export", "read back", "measure"])
def test_an_interrupted_run_leaves_the_old_file(model, tmp_path, stage):
    data = save_dataset(tmp_path / "data", load_tokenizer(model).fingerprint())
    (tmp_path / "m.gguf").write_text("old")
    (tmp_path / "m.gguf.md").write_text("old card")

    def stop(progress):
        if progress.stage == stage:
            raise KeyboardInterrupt

    calibrated = {"data_path": data, "num_calibration_samples": 4, "force": True}
    with pytest.raises(KeyboardInterrupt):
        run(config(model, tmp_path / "m.gguf", **calibrated), stop)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "m.gguf", "m.gguf.md"}
    assert (tmp_path / "m.gguf").read_text() == "old"
    assert (tmp_path / "m.gguf.md").read_text() == "old card"


def test_fewer_rows_than_asked_for_are_told(model, tmp_path):
    data = save_dataset(tmp_path / "data", load_tokenizer(model).fingerprint())
    result = run(config(model, tmp_path / "m.gguf", data_path=data, num_calibration_samples=10_000))
    assert any("all of them were used" in note for note in result.notes)
    assert "all of them were used" in (tmp_path / "m.gguf.md").read_text()


def test_measuring_leaves_the_weights_of_the_source(model, tmp_path):
    """They are a map of its file, which a model that was loaded from it shares."""
    data = save_dataset(tmp_path / "data", load_tokenizer(model).fingerprint())
    source, name = open_model(model), f"{UP}.weight"
    before = source.tensor(name).clone()
    stored = [(name, torch.zeros_like(before))]
    found = divergence(source, stored, held_out_rows(data, 64), lambda _: None)
    assert found.kl > 0.01 and torch.equal(source.tensor(name), before)


def test_a_modelfile_and_a_run_folder_go_with_it(model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    result = run(config(model, tmp_path / "m.gguf", ollama=True, run=tmp_path / "run"))
    assert {path.name for path in result.written} == {"Modelfile", "m.gguf.md"}
    assert "ollama create" in (tmp_path / "m.gguf.md").read_text()
    (row,) = json.loads((tmp_path / "run" / "files.json").read_text())["rows"]
    assert row["bytes"] == (tmp_path / "m.gguf").stat().st_size


def test_q5_0_and_q4_k_decode_as_the_file_does(exported):
    """`open_model` reads the file with llama.cpp's package; blocks agree with our own decoder."""
    _, root, _ = exported
    reader = GGUFReader(root / "m.gguf")
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q5_0":
            blocks = tensor.data.reshape(len(tensor.data), -1, 22)
            steps = blocks[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            codes = values.reshape(*steps.shape, 32) / steps[..., None]
            weight = Q50(
                torch.from_numpy(codes.round().astype(np.int8)).flatten(1), torch.from_numpy(steps)
            )
            assert np.array_equal(weight.pack(), tensor.data)
