"""The quantized folder: what is written is what is read, by us and by the safetensors library;
damage is named.
"""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import load_model, open_model, read_tensors
from xinslm.model.quantized import is_quantized
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    save_random_model(root / "model", tie_word_embeddings=False)
    run(QuantizeConfig(root / "model", root / "q4", method="rtn"))
    return root / "q4"


@pytest.fixture
def damaged(quantized, tmp_path):
    """A copy of the folder whose weights `edit` may change; the manifest is made to fit the new
    size.
    """

    def edit(change):
        folder = tmp_path / "damaged"
        folder.mkdir()
        for path in quantized.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / "quantized.safetensors")
        change(tensors)
        save_file(tensors, folder / "quantized.safetensors")
        manifest = json.loads((folder / "manifest.json").read_text())
        data = (folder / "quantized.safetensors").read_bytes()
        manifest["files"]["quantized.safetensors"] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return edit


def test_more_layers_than_weights_are_refused_before_they_are_built(damaged, monkeypatch):
    folder = damaged(lambda tensors: None)
    config, manifest = folder / "config.json", folder / "manifest.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**12}))
    facts = json.loads(manifest.read_text())
    facts["files"]["config.json"] = {
        "bytes": config.stat().st_size,
        "sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(facts))
    monkeypatch.setattr("xinslm.model.source.Transformer", lambda *_: pytest.fail("built"))
    with pytest.raises(XinslmError, match="has 1,000,000,000,000 layers"):
        load_model(folder)


def test_stored_shapes_and_types_are_the_documented_ones(quantized):
    tensors = load_file(quantized / "quantized.safetensors")
    up = "model.layers.1.mlp.up_proj"
    assert tensors[f"{up}.codes"].dtype == torch.uint8 and tensors[f"{up}.codes"].shape == (96, 32)
    assert tensors[f"{up}.scales"].dtype == torch.float16 and tensors[f"{up}.scales"].shape == (
        96,
        2,
    )
    for table in ("model.embed_tokens", "lm_head"):
        assert tensors[f"{table}.codes"].dtype == torch.int8 and tensors[
            f"{table}.codes"
        ].shape == (320, 64)
    assert tensors["model.norm.weight"].dtype == torch.float32
    formats = json.loads((quantized / "manifest.json").read_text())["formats"]
    assert formats[up] == "q4_0" and formats["lm_head"] == "q8_0" and formats["model.norm"] == "f32"


def test_dequantized_by_hand(quantized):
    """The formula of the format, written out for one weight: scale times (nibble - 8)."""
    tensors = load_file(quantized / "quantized.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    weight = dict(read_tensors(quantized))[f"{name}.weight"]
    codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
    for row, column in ((0, 0), (3, 15), (3, 16), (31, 33), (31, 63)):
        block, place = divmod(column, 32)
        byte = int(codes[row, 16 * block + place % 16])
        nibble = byte >> 4 if place >= 16 else byte & 15
        assert float(weight[row, column]) == float(scales[row, block]) * (nibble - 8)


def test_loads_into_the_model(quantized):
    model = load_model(quantized)
    weights = dict(read_tensors(quantized))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.isfinite(model.logits(model.hidden(torch.tensor([[1, 2, 3]])))).all()
    assert load_model(quantized, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_bfloat16_keeps_the_scales(quantized):
    """Scales have 8 significant bits, so only the product is rounded: at most 2^-8 of each
    weight.
    """
    exact, short = load_model(quantized), load_model(quantized, torch.bfloat16)
    for name, weight in exact.state_dict().items():
        if "proj" in name:
            difference = (short.state_dict()[name].float() - weight).abs()
            assert (difference <= weight.abs() * 2**-8).all()
            scales = open_model(quantized).stored(name).scales
            assert torch.equal(scales.bfloat16().float(), scales.float())


def test_who_is_quantized(quantized, tmp_path):
    assert is_quantized(quantized)
    assert not is_quantized(tmp_path)
    with pytest.raises(UsageError, match="is not a model folder"):
        open_model(tmp_path)


def test_missing_tensor_wrong_type_wrong_shape_and_bad_scales_are_named(damaged):
    name = "model.layers.0.mlp.down_proj"

    def change(tensors):
        tensors[f"{name}.codes"] = tensors[f"{name}.codes"].to(torch.int16)
        tensors["model.layers.0.mlp.up_proj.codes"] = tensors["model.layers.0.mlp.up_proj.codes"][
            :-1
        ].clone()
        tensors["lm_head.scales"][3, 1] = torch.inf
        del tensors["model.norm.weight"]

    model = open_model(damaged(change))
    for weight, what in (
        (f"{name}.weight", "is torch.int16"),
        ("model.layers.0.mlp.up_proj.weight", r"\(95, 32\)"),
        ("lm_head.weight", "NaN or infinity"),
        ("model.norm.weight", "has no 'model.norm.weight'"),
    ):
        with pytest.raises(XinslmError, match=what):
            model.stored(weight)


def test_truncated_file_is_refused(damaged):
    folder = damaged(lambda tensors: None)
    file = folder / "quantized.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(XinslmError, match="damaged or"):
        open_model(folder)


def test_the_streamed_file_is_a_proper_safetensors_file(tmp_path):
    """Sizes that are no multiple of 8 come between others; the library maps all of them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randint(0, 255, (3, 5), dtype=torch.uint8, generator=generator),
        "b": torch.randn(7, generator=generator).half(),
        "c": torch.randn(4, 4, generator=generator),
        "d": torch.randn(5, generator=generator),
        "e": torch.randint(-128, 127, (1, 1), dtype=torch.int8, generator=generator),
        "f": torch.randn(8, 2, generator=generator).half(),
    }
    with SafetensorsWriter(tmp_path / "x.safetensors", list(tensors)) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


@pytest.mark.parametrize("content", ["[1]", "null", '"quantized"', "3"])
def test_a_manifest_that_is_no_object_is_not_one_of_a_quantized_folder(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert not is_quantized(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"formats": None}, {"formats": []}, {"bits": "4"}, {"formats": {"model.norm": ["f32"]}}],
)
def test_a_manifest_with_damaged_entries_is_named(damaged, changes):
    folder = damaged(lambda tensors: None)
    manifest = json.loads((folder / "manifest.json").read_text())
    if isinstance(changes.get("formats"), dict):
        changes = {"formats": {**manifest["formats"], **changes["formats"]}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(XinslmError, match=r"manifest\.json"):
        list(read_tensors(folder))
