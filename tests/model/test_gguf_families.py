"""GGUF files of each family: random models of transformers, written by the `gguf` package under its
own names, read back, imported, and compared with llama.cpp on the same file.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, get_tensor_name_map, quants
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from llama_cpp import LlamaCpp
from small_models import TEXT, save_random_model, save_tokenizer
from xinslm.commands import run
from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.config import EvaluateConfig
from xinslm.export.config import GgufConfig, ImportConfig
from xinslm.export.vocabulary import read_vocabulary
from xinslm.model.config import ModelConfig
from xinslm.model.files import load_model, open_model, save_model
from xinslm.teachers.open import open_teacher

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {"sliding_window": 16, "query_pre_attn_scalar": 64},
    ),
}


def write_family(folder, name, kind=Type.F32):
    """A random model of a family in `folder`/m.gguf; returns transformers' model."""
    config_class, model_class, changes = FAMILIES[name]
    tied = name == "gemma3"
    shape = {**SHAPE, "rope_theta": 1e4, **changes}
    config = config_class(**shape, tie_word_embeddings=tied, pad_token_id=2)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.1 if weight.dim() > 1 else 0.3
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
            if weight.dim() == 1 and name != "gemma3":
                weight.add_(1)
    save_tokenizer(folder, 320, None)
    writer = GGUFWriter(folder / "m.gguf", name)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    if name == "gemma3":
        writer.add_sliding_window(16)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 7}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    read_vocabulary(folder, ModelConfig(320, **shape, **heads)).write(writer)
    names = get_tensor_name_map(MODEL_ARCH[name.upper()], config.num_hidden_layers)
    for ours, weight in model.state_dict().items():
        if ours == "lm_head.weight" and tied:
            continue
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        values = weight.numpy() + np.float32(name == "gemma3" and weight.dim() == 1)
        used = kind if values.ndim == 2 and "embd" not in theirs else Type.F32
        writer.add_tensor(theirs, quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def log_probs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_transformers_model_and_llama_cpps(tmp_path, name):
    model = write_family(tmp_path, name)
    run(ImportConfig(tmp_path / "m.gguf", tmp_path / "out"))
    imported, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key, weight in model.state_dict().items():
        offset = name == "gemma3" and weight.dim() == 1
        expected = (weight + 1) - 1 if offset else weight
        assert torch.equal(imported.state_dict()[key], expected), key
    ids = np.random.default_rng(0).integers(5, 320, 40).tolist()
    expected = log_probs(model, ids)
    np.testing.assert_allclose(log_probs(imported, ids), expected, atol=1e-4)
    teacher = open_teacher(str(tmp_path / "m.gguf"))
    found = teacher.logits(teacher.states([np.array(ids)])).double().log_softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        assert np.abs(llama.next_logprobs(ids, 320) - expected[-1]).max() < 2e-3
    (tmp_path / "text.txt").write_text(TEXT)
    measured = run(EvaluateConfig(tmp_path / "m.gguf", (str(tmp_path / "text.txt"),)))
    assert measured.kind == "gguf" and measured.bits_per_byte > 1


def test_what_needs_our_transformer_says_so(tmp_path):
    write_family(tmp_path, "gemma3")
    with pytest.raises(XinslmError, match=r"model_type is 'gemma3_text'.*'qwen2' or 'qwen3'"):
        load_model(tmp_path / "m.gguf")


TYPES = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.F16, Type.BF16, Type.F32]
K_TYPES = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def retyped(source, path, kind):
    """Copy a GGUF file with its matrices in another type; K-quants have random blocks."""
    reader, rng = GGUFReader(source), np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        if kind in K_TYPES:
            size = quants.quant_shape_to_byte_shape(values.shape, kind)
            data = rng.integers(0, 256, size).astype(np.uint8)
            blocks = data.reshape(-1, size[-1] // (values.shape[1] // 256))
            scale = np.float16(2e-4).view(np.uint16).astype("<u2").tobytes()
            places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2))
            for place in places:
                blocks[:, place : place + 2] = np.frombuffer(scale, np.uint8)
        else:
            data = quants.quantize(values, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    save_random_model(
        root / "model", hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=512
    )
    run(GgufConfig(root / "model", root / "m.gguf", outtype="f32"))
    return root


@pytest.mark.parametrize("kind", [*TYPES, *K_TYPES], ids=lambda kind: kind.name)
def test_a_type_is_stored_bit_for_bit(plain, tmp_path, kind):
    retyped(plain / "m.gguf", tmp_path / "m.gguf", kind)
    result = run(ImportConfig(tmp_path / "m.gguf", tmp_path / "out"))
    assert (result.dtype, result.is_exact) == ("float32", True)  # norms are no 16-bit numbers
    model = load_model(tmp_path / "out")
    for theirs, ours in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        stored = next(
            t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == f"blk.1.{theirs}.weight"
        )
        expected = quants.dequantize(stored.data, stored.tensor_type)
        assert (
            model.get_parameter(f"model.layers.1.{ours}.weight").detach().numpy() == expected
        ).all()
    ids = np.random.default_rng(0).integers(5, 320, 20).tolist()
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids]))
        found = model.logits(hidden)[0, -1].double().log_softmax(0).numpy()
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        theirs = llama.next_logprobs(ids, 512)
    # llama.cpp rounds activations to 8 bits for quantized weights, to 16 for 16-bit ones
    limit = {"F32": 1e-3, "F16": 0.02, "BF16": 0.1}.get(kind.name, 1.0)
    assert np.abs(found - theirs).mean() < limit


def test_the_narrowest_exact_type_is_stored(tmp_path):
    model = save_random_model(tmp_path / "model")
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    save_model(model, tmp_path / "model")
    run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype="bf16"))
    result = run(ImportConfig(tmp_path / "m.gguf", tmp_path / "out"))
    assert (result.dtype, result.is_exact) == ("bfloat16", True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
    rounded = run(ImportConfig(tmp_path / "m.gguf", tmp_path / "half", dtype="float16"))
    assert (rounded.dtype, rounded.is_exact) == ("float16", False)
    assert "weights rounded" in rounded.describe()


LLAMA3_ROPES = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 32)]


@pytest.mark.parametrize(("factor", "low", "high", "context"), LLAMA3_ROPES)
def test_llama3_rescaling_returns_as_it_was(tmp_path, factor, low, high, context):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    save_random_model(tmp_path / "model", rope_scaling=scaling, rope_theta=5e5, head_dim=64)
    run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    assert open_model(tmp_path / "m.gguf").config.rope_scaling == scaling


def damaged(path, out, changes):
    """Copy a GGUF file with other values of some keys."""
    reader = GGUFReader(path)
    writer = GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture")):
            continue
        value, kind = field.contents(), field.types[0]
        inner = field.types[1] if len(field.types) > 1 else None
        if key in changes:
            value, kind, inner = changes[key]
        writer.add_key_value(key, value, kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_damaged_keys_are_refused(plain, tmp_path):
    from gguf import GGUFValueType as Value

    cases = {
        "llama.attention.head_count": ("four", Value.STRING, None),
        "llama.block_count": (10**12, Value.UINT64, None),
        "llama.context_length": (10**12, Value.UINT64, None),
        "llama.embedding_length": ([1, 2], Value.ARRAY, Value.UINT32),
        "llama.rope.freq_base": (float("nan"), Value.FLOAT32, None),
        "tokenizer.ggml.token_type": (7, Value.UINT32, None),
        "tokenizer.ggml.tokens": ([1, 2], Value.ARRAY, Value.UINT32),
        "tokenizer.ggml.merges": (["a"], Value.ARRAY, Value.STRING),
    }
    for number, (key, value) in enumerate(cases.items()):
        path = damaged(plain / "m.gguf", tmp_path / f"{number}.gguf", {key: value})
        with pytest.raises(XinslmError, match=rf"{number}\.gguf"):
            run(ImportConfig(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    message = r"max_position_embeddings is 1,000,000,000,000, but must be at most 16,777,216"
    with pytest.raises(XinslmError, match=message):
        load_model(tmp_path / "2.gguf")


def test_an_unknown_type_of_weights_is_named(plain, tmp_path):
    data = bytearray((plain / "m.gguf").read_bytes())
    reader = GGUFReader(plain / "m.gguf")
    part = reader.tensors[0].field.parts[4]
    at = part.__array_interface__["data"][0] - reader.data.__array_interface__["data"][0]
    data[at : at + 4] = (99).to_bytes(4, "little")
    (tmp_path / "new.gguf").write_bytes(data)
    with pytest.raises(UsageError, match=r"weights of a type that .*99"):
        open_model(tmp_path / "new.gguf")


def test_a_file_is_known_by_its_first_bytes(plain, tmp_path):
    (tmp_path / "model").write_bytes((plain / "m.gguf").read_bytes())
    assert open_model(tmp_path / "model").kind == "gguf"
    with pytest.raises(UsageError, match=r"It contains m\.gguf: give that file"):
        open_model(plain)
