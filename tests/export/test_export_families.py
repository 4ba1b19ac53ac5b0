"""Qwen2, Qwen3 and LLaMA with biases in every format: stock transformers, llama.cpp and mlx-lm read
what is written, as the family that it is, and compute the same.
"""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from small_models import FAMILIES, save_random_model
from xinslm.commands import run
from xinslm.errors import UsageError
from xinslm.export.config import CoremlConfig, GgufConfig, HfConfig, ImportConfig, MlxConfig
from xinslm.model.files import load_model, open_model, read_tensors
from xinslm.quantize.config import QuantizeConfig

IDS = np.random.default_rng(0).integers(5, 320, 24)
CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
WIDTH_100 = {"hidden_size": 100, "intermediate_size": 96}
"""No row of q, k, v, gate, up and the embedding is in blocks of 32; those of o and down are."""


@pytest.fixture(scope="module", params=[*FAMILIES, "width 100"])
def model(request, tmp_path_factory):
    """A random model `full` and its 4-bit form `q`; the family's name."""
    folder = tmp_path_factory.mktemp("family")
    save_random_model(folder / "full", **FAMILIES.get(request.param, WIDTH_100))
    run(QuantizeConfig(folder / "full", folder / "q", method="rtn"))
    return folder, request.param


def our_logits(path):
    with torch.no_grad():
        model = load_model(path)
        return model.logits(model.hidden(torch.tensor(IDS[None])))[0]


def log_probs(logits):
    return logits[-1].double().log_softmax(-1).numpy()


def their_logits(path, name):
    loaded, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(loaded).__name__ == CLASSES.get(name, "LlamaForCausalLM")
    with torch.no_grad():
        return loaded(torch.tensor(IDS[None])).logits[0]


def assert_same_weights(path, expected):
    found = dict(read_tensors(path))
    assert found.keys() == dict(read_tensors(expected)).keys()
    for name, weight in read_tensors(expected):
        assert torch.equal(found[name], weight), name


def test_transformers_computes_the_same(model):
    folder, name = model
    expected = their_logits(folder / "full", name)
    assert torch.allclose(our_logits(folder / "full"), expected, atol=1e-4)
    assert expected.std() > 0.5


def test_quantization_rounds_no_vector(model):
    folder, _ = model
    original = dict(read_tensors(folder / "full"))
    formats = open_model(folder / "q").formats
    assert formats.keys() == original.keys()
    for name, weight in read_tensors(folder / "q"):
        if weight.dim() == 1:
            assert formats[name] == "f32" and torch.equal(weight, original[name]), name


def test_llama_cpp_computes_the_same(model, tmp_path):
    from llama_cpp import LlamaCpp

    folder, name = model
    for source, outtype in ((folder / "full", "f32"), (folder / "q", None)):
        path = tmp_path / f"{source.name}.gguf"
        run(GgufConfig(source, path, outtype=outtype))
        architecture = GGUFReader(path).fields["general.architecture"].contents()
        assert architecture == (name if name in CLASSES else "llama")
        with LlamaCpp(path) as llama:
            theirs = llama.next_logprobs(IDS.tolist(), 320)
        if outtype:
            assert np.abs(theirs - log_probs(our_logits(source))).max() < 1e-4
        else:  # llama.cpp rounds the inputs of codes, and those of 16-bit weights to 16 bits
            rounded = load_model(source, activations="int8")
            with torch.no_grad():
                logits = rounded.logits(rounded.hidden(torch.tensor(IDS[None])))[0]
            difference = np.abs(theirs - log_probs(logits)).max()
            assert difference < (0.2 if name == "width 100" else 0.02)


def test_gguf_returns_bit_for_bit(model, tmp_path):
    folder, _ = model
    for source, outtype in ((folder / "full", "f32"), (folder / "q", None)):
        path = tmp_path / f"{source.name}.gguf"
        run(GgufConfig(source, path, outtype=outtype))
        assert open_model(path).config == open_model(source).config
        assert_same_weights(path, source)
        run(ImportConfig(path, tmp_path / source.name))
        assert_same_weights(tmp_path / source.name, source)
    run(QuantizeConfig(tmp_path / "q.gguf", tmp_path / "kept", method="keep"))
    assert_same_weights(tmp_path / "kept", folder / "q")


def test_greedy_ids_are_llama_cpps(model, tmp_path):
    from llama_cpp import LlamaCpp
    from xinslm.model.decode import RowDecoder

    folder, _ = model
    run(GgufConfig(folder / "full", tmp_path / "m.gguf", outtype="f32"))
    decoder = RowDecoder(load_model(tmp_path / "m.gguf"), 1, 64)
    logits, ids = decoder.read([0], [IDS])[0], IDS.tolist()
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        for _ in range(8):
            token = int(logits[0].argmax())
            assert token == int(llama.next_logprobs(ids, 320).argmax())
            ids.append(token)
            logits = decoder.step(torch.tensor([token]))


def test_compressed_tensors_in_transformers(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, name = model
    run(HfConfig(folder / "q", tmp_path / "hf"))
    assert torch.allclose(their_logits(tmp_path / "hf", name), our_logits(folder / "q"), atol=1e-4)
    assert_same_weights(tmp_path / "hf", folder / "q")


def test_gptq_keeps_the_vectors(model, tmp_path):
    folder, name = model
    if name == "width 100":
        with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.q_proj is not in 4 bits"):
            run(HfConfig(folder / "q", tmp_path / "gptq", format="gptq"))
        return
    run(HfConfig(folder / "q", tmp_path / "gptq", format="gptq"))
    assert_same_weights(tmp_path / "gptq", folder / "q")


def test_mlx_computes_the_same(model, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    folder, _ = model
    for source in (folder / "full", folder / "q"):
        run(MlxConfig(source, tmp_path / source.name))
        loaded, _ = utils.load_model(tmp_path / source.name)
        logits = np.array(loaded(mx.array(IDS[None].astype(np.int32)))[0].astype(mx.float32))
        assert np.abs(logits - our_logits(source).numpy()).max() < 2e-4
        assert_same_weights(tmp_path / source.name, source)


def test_the_core_ml_program_computes_the_same(model, tmp_path):
    pytest.importorskip("coremltools")
    from mil import Program

    from xinslm.export.coreml.program import causal_mask
    from xinslm.export.coreml.run import PACKAGE

    folder, _ = model
    run(CoremlConfig(folder / "q", tmp_path / "out", max_seq_length=32))
    program, ids = Program(tmp_path / "out" / PACKAGE, True), torch.from_numpy(IDS[None])
    parts = [
        program(inputIds=ids[:, a:b], fullAttentionMask=causal_mask(b - a, a))
        for a, b in ((0, 9), (9, 10), (10, 24))
    ]
    expected = our_logits(folder / "q")
    assert (torch.cat(parts, 1).float()[0] - expected).abs().max() < 5e-3 * expected.std()


def test_what_runtimes_cannot_read_is_refused_by_name(tmp_path):
    """mlx-lm's Qwen2 has heads of hidden_size / num_attention_heads."""
    save_random_model(tmp_path / "wide", **FAMILIES["qwen2"] | {"head_dim": 32})
    with pytest.raises(UsageError, match=r"head_dim 32.*mlx-lm"):
        run(MlxConfig(tmp_path / "wide", tmp_path / "mlx"))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    save_random_model(tmp_path / "rescaled", **FAMILIES["qwen3"], rope_scaling=scaling)
    with pytest.raises(UsageError, match=r"qwen3 with LLaMA-3's rescaling.*export hf"):
        run(GgufConfig(tmp_path / "rescaled", tmp_path / "m.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rescaled", "wide"]
    settings = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert settings["model_type"] == "qwen2" and settings["head_dim"] == 32
