"""`export gguf` of models that other programs, or other exports, hold codes of: none is rounded."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

from llama_cpp import LlamaCpp
from small_models import save_random_model
from xinslm.commands import run
from xinslm.errors import XinslmError
from xinslm.export import gguf_tensors
from xinslm.export.config import AllConfig, GgufConfig, HfConfig, MlxConfig
from xinslm.model.files import load_model, read_tensors
from xinslm.quantize.config import QuantizeConfig

HEADS = {"attn_q": 4, "attn_k": 2}
SOURCES = {
    "compressed-tensors": lambda model, out: HfConfig(model, out),
    "gptq": lambda model, out: HfConfig(model, out, format="gptq"),
    "mlx": lambda model, out: MlxConfig(model, out),
    "gguf": lambda model, out: GgufConfig(model, out),
}


@pytest.fixture(scope="module", params=[4, 8])
def quantized(request, tmp_path_factory):
    """A quantized folder and the GGUF that is written from it directly."""
    folder = tmp_path_factory.mktemp("codes")
    save_random_model(folder / "full", intermediate_size=160)
    run(QuantizeConfig(folder / "full", folder / "q", method="rtn", bits=request.param))
    run(GgufConfig(folder / "q", folder / "direct.gguf"))
    return folder


def blocks(path):
    """Tensors of a GGUF file by name: type and bytes, from the package of llama.cpp."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def values(path):
    """Weights of a GGUF file in Hugging Face's order of rows, by llama.cpp's names."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        weight = quants.dequantize(tensor.data, tensor.tensor_type)
        heads = next((n for name, n in HEADS.items() if name in tensor.name), 0)
        if heads:  # as llama.cpp's converter defines the order
            half = weight.shape[0] // heads // 2
            weight = weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        found[tensor.name] = weight
    return found


def make(quantized, tmp_path, kind):
    """The quantized folder in another format; skipped if that has no place for its codes."""
    bits = json.loads((quantized / "q" / "manifest.json").read_text())["bits"]
    if kind == "gptq" and bits == 8:
        pytest.skip("GPTQ's checkpoints are of 4 bits here")
    path = tmp_path / ("other.gguf" if kind == "gguf" else kind)
    run(SOURCES[kind](quantized / "q", path))
    return path


@pytest.mark.parametrize("kind", SOURCES)
def test_blocks_are_those_of_the_direct_export(quantized, tmp_path, kind):
    path = make(quantized, tmp_path, kind)
    result = run(GgufConfig(path, tmp_path / "m.gguf"))
    direct, found = blocks(quantized / "direct.gguf"), blocks(tmp_path / "m.gguf")
    assert found.keys() == direct.keys()
    plain = {"token_embd.weight"} if kind in ("compressed-tensors", "gptq") else set()
    for name, (form, data) in direct.items():
        assert name in plain or found[name] == (form, data), name
    fields = [GGUFReader(p).fields for p in (quantized / "direct.gguf", tmp_path / "m.gguf")]
    assert len({f["general.file_type"].contents() for f in fields}) == 1
    if plain:  # these formats hold the embedding without codes
        assert found["token_embd.weight"][0] == "F16"
        assert result.notes[0].startswith("model.embed_tokens.weight: no codes")
        assert result.rounded > 0 and "values rounded, all others equal" in result.describe()
    else:
        assert result.rounded == 0 and "values equal the model's" in result.describe()


@pytest.mark.parametrize("kind", SOURCES)
def test_values_are_the_models(quantized, tmp_path, kind):
    path = make(quantized, tmp_path, kind)
    run(GgufConfig(path, tmp_path / "m.gguf"))
    found = values(tmp_path / "m.gguf")
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    compared = 0
    for name, weight in read_tensors(path):
        words = name.split(".")
        if len(words) > 4 and words[4] in parts:
            theirs = found[f"blk.{words[2]}.{parts[words[4]]}.weight"]
            assert np.array_equal(theirs, weight.numpy()), name
            compared += 1
    assert compared == 14


@pytest.mark.parametrize("kind", ["compressed-tensors", "mlx"])
def test_llama_cpp_writes_the_same(quantized, tmp_path, kind):
    path = make(quantized, tmp_path, kind)
    run(GgufConfig(path, tmp_path / "m.gguf"))
    ids = np.random.default_rng(1).integers(5, 320, 40).tolist()
    seen = []
    for file in (quantized / "direct.gguf", tmp_path / "m.gguf"):
        with LlamaCpp(file) as llama:
            seen.append((llama.next_logprobs(ids, 320), llama.complete("The quick", 8)))
    (direct, text), (other, same) = seen
    if kind == "mlx":
        assert np.array_equal(direct, other) and text == same
        return
    # the table has float16 there, and llama.cpp rounds inputs of each product to int8
    with torch.no_grad():
        model = load_model(path)
        ours = model.logits(model.hidden(torch.tensor([ids])))[0, -1].double().log_softmax(-1)
    spread = ours.std().item()
    assert np.std(other - direct) / spread < 0.1 and np.std(other - ours.numpy()) / spread < 0.1


@pytest.mark.parametrize("kind", SOURCES)
def test_a_type_that_is_asked_for_wins_over_codes(quantized, tmp_path, kind):
    path = make(quantized, tmp_path, kind)
    types = [
        run(GgufConfig(model, tmp_path / f"{name}.gguf", outtype="f16")).types
        for name, model in (("a", path), ("b", quantized / "q"))
    ]
    assert types[0] == types[1] == {"F16": 15, "F32": 5}


def test_export_all_of_another_format_keeps_codes(quantized, tmp_path):
    run(MlxConfig(quantized / "q", tmp_path / "mlx"))
    run(AllConfig(tmp_path / "mlx", tmp_path / "all"))
    assert blocks(tmp_path / "all" / "model.gguf") == blocks(quantized / "direct.gguf")


def test_codes_that_llama_cpp_has_no_block_for_are_written_as_values(quantized, tmp_path):
    """Columns in another order, and a scale beyond float16's digits."""
    path = make(quantized, tmp_path, "compressed-tensors")
    tensors = load_file(path / "model.safetensors")
    first, second = [n for n in tensors if n.endswith("k_proj.weight_scale")]
    tensors[first] = tensors[first].float() * 1.0001
    stem = second.removesuffix(".weight_scale")
    columns = 32 * tensors[second].shape[1]
    tensors[f"{stem}.weight_g_idx"] = (torch.arange(columns) // 32).flip(0).int()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "manifest.json").unlink()
    result = run(GgufConfig(path, tmp_path / "m.gguf"))
    kinds = {name: kind for name, (kind, _) in blocks(tmp_path / "m.gguf").items()}
    assert [n for n in kinds if "blk" in n and kinds[n] == "F16"] == [
        "blk.0.attn_k.weight",
        "blk.1.attn_k.weight",
    ]
    assert "and 2 more: no codes" in result.notes[0]
    exact = dict(read_tensors(path))[f"{stem}.weight"].half().float().numpy()
    assert np.array_equal(values(tmp_path / "m.gguf")["blk.1.attn_k.weight"], exact)


def test_a_wrong_block_is_found_before_the_file_is_there(quantized, tmp_path, monkeypatch):
    plain = gguf_tensors.reordered
    calls = []

    def broken(rows, name, model):
        rows = plain(rows, name, model)
        if rows.dtype == np.uint8 and "layers.1.mlp.up_proj" in name:
            rows = rows.copy()
            rows[3, 5] ^= 1
            calls.append(name)
        return rows

    monkeypatch.setattr(gguf_tensors, "reordered", broken)
    with pytest.raises(XinslmError, match=r"up_proj.weight: 1 values differ.*nothing is written"):
        run(GgufConfig(quantized / "q", tmp_path / "m.gguf"))
    assert calls and not any(tmp_path.iterdir())
