"""`export gguf --embedding-type`: the embedding in a type of its own, next to any body."""

from collections import Counter

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

from llama_cpp import LlamaCpp
from small_models import save_random_model
from xinslm.commands import run
from xinslm.errors import UsageError, XinslmError
from xinslm.export import tables
from xinslm.export.config import GgufConfig
from xinslm.model.files import load_model, open_model
from xinslm.quantize.config import QuantizeConfig

TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model with rows of 256, and its 4-bit folder."""
    folder = tmp_path_factory.mktemp("tables")
    save_random_model(folder / "model", hidden_size=256, intermediate_size=160)
    run(QuantizeConfig(folder / "model", folder / "q4", method="rtn"))
    return folder


def tensors(path):
    return {t.name: (t.tensor_type.name, t.data) for t in GGUFReader(path).tensors}


def values(path, name="token_embd.weight"):
    (tensor,) = (t for t in GGUFReader(path).tensors if t.name == name)
    return quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def error(found, expected):
    return np.sqrt(np.square(found - expected).sum() / np.square(expected).sum())


@pytest.mark.parametrize(
    ("kind", "bits", "most"), [("q6_k", 210 / 32, 0.02), ("q8_0", 8.5, 0.006), ("f16", 16, 3e-4)]
)
def test_the_table_alone_changes(root, tmp_path, kind, bits, most):
    run(GgufConfig(root / "q4", tmp_path / "plain.gguf"))
    result = run(GgufConfig(root / "q4", tmp_path / "m.gguf", embedding_type=kind))
    plain, found = tensors(tmp_path / "plain.gguf"), tensors(tmp_path / "m.gguf")
    assert found["token_embd.weight"][0] == kind.upper()
    assert found["token_embd.weight"][1].nbytes == 320 * 256 * bits / 8
    for name in plain.keys() - {"token_embd.weight"}:
        assert plain[name][0] == found[name][0]
        assert np.array_equal(plain[name][1], found[name][1])
    table = open_model(root / "model").tensor(TABLE).numpy()
    assert error(values(tmp_path / "m.gguf"), table) < most + 0.006  # of the folder's 8 bits
    assert result.types == dict(Counter(kind for kind, _ in found.values()))
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.file_type"].contents() == 2, "mostly Q4_0"
    if kind == "q8_0":
        assert np.array_equal(plain["token_embd.weight"][1], found["token_embd.weight"][1])
        assert result.rounded == 0 and not result.notes
    if kind == "f16":
        assert result.rounded > 0 and not result.notes
    if kind == "q6_k":
        assert f"{TABLE}: rounded to Q6_K, relative error 1." in result.describe()
        assert result.rounded > 0


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "f16", "bf16", "f32"])
def test_llama_cpp_multiplies_with_the_stored_table(root, tmp_path, kind):
    """The rest is float32, so that what differs is its rounding of the head's inputs."""
    run(GgufConfig(root / "model", tmp_path / "m.gguf", outtype="f32", embedding_type=kind))
    model = load_model(tmp_path / "m.gguf")
    ids = np.random.default_rng(2).integers(5, 320, 40).tolist()
    with torch.no_grad():
        ours = model.logits(model.hidden(torch.tensor([ids])))[0, -1].double().log_softmax(-1)
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        theirs = llama.next_logprobs(ids, 320)
    bound = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}.get(kind, 2e-2)
    assert np.std(theirs - ours.numpy()) / ours.numpy().std() < bound


def test_an_untied_head_has_the_type_too(tmp_path):
    save_random_model(tmp_path / "model", hidden_size=256, tie_word_embeddings=False)
    run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", embedding_type="q6_k"))
    kinds = {name: kind for name, (kind, _) in tensors(tmp_path / "m.gguf").items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q6_K"
    assert Counter(kinds.values()) == {"Q6_K": 2, "F16": 14, "F32": 5}
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.file_type"].contents() == 1, "mostly F16"
    head = open_model(tmp_path / "model").tensor("lm_head.weight").numpy()
    assert error(values(tmp_path / "m.gguf", "output.weight"), head) < 0.02


@pytest.mark.parametrize(
    ("width", "kind", "other"), [(64, "q6_k", "q8_0"), (48, "q6_k", "f16"), (48, "q8_0", "f16")]
)
def test_rows_that_no_block_fits_are_refused_by_name(tmp_path, width, kind, other):
    save_random_model(tmp_path / "model", hidden_size=width)
    with pytest.raises(UsageError, match=rf"has {width}\. Choose --embedding-type {other}"):
        run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", embedding_type=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("factor", [1e12, 1e-9])
@pytest.mark.parametrize("kind", ["q8_0", "q6_k"])
def test_values_beyond_the_scales_are_refused_by_name(root, tmp_path, kind, factor):
    save_random_model(tmp_path / "model", hidden_size=256)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights[TABLE] *= factor
    save_file(weights, file)
    with pytest.raises(XinslmError, match=f"{TABLE}.*{kind} cannot hold: .*bf16"):
        run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", embedding_type=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("is_tied", "tables_of"), [(True, 1), (False, 2)])
def test_the_scales_of_a_table_are_searched_for_once(tmp_path, monkeypatch, is_tied, tables_of):
    """The check compares with what was found when the file was written."""
    calls, search = [], tables.quantize_q6_k
    monkeypatch.setattr(tables, "quantize_q6_k", lambda x: calls.append(1) or search(x))
    save_random_model(tmp_path / "model", hidden_size=256, tie_word_embeddings=is_tied)
    run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", embedding_type="q6_k"))
    assert len(calls) == tables_of
    expected = search(open_model(tmp_path / "model").tensor(TABLE).float()).decode()
    assert np.array_equal(values(tmp_path / "m.gguf"), expected.view(-1, 256).numpy())


def test_a_wrong_block_is_found_before_the_file_is_there(root, tmp_path, monkeypatch):
    pack = tables.to_blocks

    def broken(weight, kind, name):
        blocks, values = pack(weight, kind, name)
        blocks[7, 3] ^= 4
        return blocks, values

    monkeypatch.setattr(tables, "to_blocks", broken)
    with pytest.raises(XinslmError, match=f"{TABLE}: 1 values differ.*nothing is written"):
        run(GgufConfig(root / "model", tmp_path / "m.gguf", embedding_type="q6_k"))
    assert not any(tmp_path.iterdir())
