"""GGUF files as llama.cpp reads them: the same probabilities, the same weights, nothing that it
would misread.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file, save_file

from llama_cpp import LlamaCpp
from small_models import make_config, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run
from xinslm.model.files import load_model, read_tensors
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(5, 320, length).tolist()


def our_logprobs(model, ids):
    with torch.no_grad():
        return (
            model.logits(model.hidden(torch.tensor([ids])))[0, -1].double().log_softmax(-1).numpy()
        )


def their_logits(folder, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).numpy()


def tensors_of(path):
    """Tensors of a GGUF file by name: type, and values after gguf's own dequantization."""
    return {
        t.name: (t.tensor_type, quants.dequantize(t.data, t.tensor_type))
        for t in GGUFReader(path).tensors
    }


def fields_of(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def unpermute(rows, heads):
    """llama.cpp's row order of q and k back to Hugging Face's, as its own converter defines it."""
    return (
        rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "rope_theta": 500000.0},
        {"rope_scaling": LLAMA3_SCALING},
        {"vocab_size": 331},
    ],
    ids=["tied GQA", "untied", "llama3 rope", "padded vocabulary"],
)
def test_float32_gives_the_probabilities_of_transformers(tmp_path, changes):
    model = save_random_model(tmp_path / "model", **changes)
    run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype="f32"))
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        for length in (2, 90):
            theirs = llama.next_logprobs(prompt(length), model.config.vocab_size)
            assert np.abs(theirs - our_logprobs(model, prompt(length))).max() < 1e-4
            assert np.abs(theirs - their_logits(tmp_path / "model", prompt(length))).max() < 1e-4


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    save_random_model(
        root / "model", num_hidden_layers=3, intermediate_size=160, tie_word_embeddings=False
    )
    quantize(QuantizeConfig(root / "model", root / "q4", method="rtn"))
    result = run(GgufConfig(root / "q4", root / "q4.gguf"))
    return root, result


def test_not_one_weight_differs(four_bits):
    root, _ = four_bits
    written = tensors_of(root / "q4.gguf")
    names = {"q": ("self_attn.q_proj", 4), "k": ("self_attn.k_proj", 2)}
    for name, weight in read_tensors(root / "q4"):
        layer = name.split(".")[2] if ".layers." in name else None
        found = None
        for short, (long, heads) in names.items():
            if long in name:
                found = unpermute(written.pop(f"blk.{layer}.attn_{short}.weight")[1], heads)
        if found is None:
            key = {
                "self_attn.v_proj": "attn_v",
                "self_attn.o_proj": "attn_output",
                "mlp.gate_proj": "ffn_gate",
                "mlp.up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
                "input_layernorm": "attn_norm",
                "post_attention_layernorm": "ffn_norm",
            }
            plain = {
                "model.embed_tokens": "token_embd",
                "model.norm": "output_norm",
                "lm_head": "output",
            }
            stem = name.removesuffix(".weight")
            short = f"blk.{layer}.{key[stem.split('.', 3)[3]]}" if layer else plain[stem]
            found = written.pop(f"{short}.weight")[1]
        assert np.array_equal(found, weight.numpy()), name
    assert not written, "nothing else is in the file"


def test_census_of_tensor_types(four_bits):
    root, result = four_bits
    kinds = {name: kind for name, (kind, _) in tensors_of(root / "q4.gguf").items()}
    for name, kind in kinds.items():
        if "norm" in name:
            assert kind == GGMLQuantizationType.F32
        elif name in ("token_embd.weight", "output.weight"):
            assert kind == GGMLQuantizationType.Q8_0
        else:
            assert kind == GGMLQuantizationType.Q4_0, name
    assert (
        result.types
        == {"Q4_0": 21, "Q8_0": 2, "F32": 7}
        == dict(Counter(kind.name for kind in kinds.values()))
    )
    assert fields_of(root / "q4.gguf")["general.file_type"] == 2


def round_inputs_to_int8(model):
    """Give every quantized linear, the head too, the inputs that llama.cpp gives it: int8 in blocks
    of 32.
    """

    def rounded(x):
        shape = x.shape
        return torch.from_numpy(
            quants.dequantize(
                quants.quantize(x.reshape(-1, shape[-1]).numpy(), GGMLQuantizationType.Q8_0),
                GGMLQuantizationType.Q8_0,
            )
        ).reshape(shape)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            # an F16 tensor's inputs
            change = rounded if module.in_features % 32 == 0 else lambda x: x.half().float()
            module.register_forward_pre_hook(lambda _, inputs, change=change: (change(inputs[0]),))
    logits = model.logits
    model.logits = lambda hidden: logits(rounded(hidden))
    return model


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": False}, {}, {"intermediate_size": 172}]
)
def test_four_bit_probabilities_differ_by_int8_activations_alone(tmp_path, changes):
    """llama.cpp rounds the inputs of each quantized linear to int8 in blocks of 32, an error of up
    to 1/254 of a block's largest value, about 0.5 % of the inputs' norm; seven linears a layer, two
    layers and the head add up to 2-3 %, which a random model's peaked attention multiplies: bounded
    by 10 % of the logits' spread (root mean square). With the same rounding in PyTorch the
    difference all but vanishes, so nothing else differs; what the bound of 1 % leaves room for is a
    code near a tie that falls the other way."""
    save_random_model(tmp_path / "model", **changes)
    quantize(QuantizeConfig(tmp_path / "model", tmp_path / "q4", method="rtn"))
    run(GgufConfig(tmp_path / "q4", tmp_path / "m.gguf"))
    exact, rounded = (
        load_model(tmp_path / "q4"),
        round_inputs_to_int8(load_model(tmp_path / "q4")),
    )
    noise, rest = [], []
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        for seed in range(4):
            ids = prompt(40, seed)
            theirs, spread = llama.next_logprobs(ids, 320), our_logprobs(exact, ids).std()
            noise.append((theirs - our_logprobs(exact, ids)).std() / spread)
            rest.append((theirs - our_logprobs(rounded, ids)).std() / spread)
    assert 1e-4 < max(noise) < 0.1
    assert max(rest) < 0.01


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_rounds_once(tmp_path, dtype):
    model = save_random_model(tmp_path / "model")
    run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype=dtype))
    written = tensors_of(tmp_path / "m.gguf")
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    down = model.model.layers[1].mlp.down_proj.weight.detach()
    assert np.array_equal(
        written["blk.1.ffn_down.weight"][1].astype(np.float32), down.to(kind).float().numpy()
    )
    assert written["blk.0.attn_norm.weight"][0] == GGMLQuantizationType.F32
    assert "output.weight" not in written, "a tied table is written once"
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        theirs, ours = llama.next_logprobs(prompt(40), 320), our_logprobs(model, prompt(40))
    assert np.std(theirs - ours) / ours.std() < {"f16": 2e-3, "bf16": 2e-2}[dtype]


def test_census_with_a_tied_table_and_rows_that_no_block_fits(tmp_path):
    save_random_model(tmp_path / "model", intermediate_size=172)
    quantize(QuantizeConfig(tmp_path / "model", tmp_path / "q4", method="rtn"))
    result = run(GgufConfig(tmp_path / "q4", tmp_path / "m.gguf"))
    assert result.types == {"Q4_0": 12, "Q8_0": 1, "F16": 2, "F32": 5}
    assert "output.weight" not in tensors_of(tmp_path / "m.gguf"), "a tied table is written once"


def test_keys(four_bits):
    root, _ = four_bits
    keys = fields_of(root / "q4.gguf")
    shape = {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "vocab_size": 320,
    }
    assert {name: keys[f"llama.{name}"] for name in shape} == shape
    assert keys["general.architecture"] == "llama" and keys["general.name"] == "q4"
    assert keys["general.quantization_version"] == 2
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_sliding_window_caps_the_context_and_says_so(tmp_path, monkeypatch):
    """Why it must: within the window llama.cpp agrees with the model, one token beyond it does
    not.
    """
    model = save_random_model(tmp_path / "model", sliding_window=24)
    result = run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype="f32"))
    assert result.context_length == 24 == fields_of(tmp_path / "m.gguf")["llama.context_length"]
    assert "sliding window of 24 tokens" in result.describe()
    monkeypatch.setattr("xinslm.export.gguf._context", lambda model: (64, ()))
    run(GgufConfig(tmp_path / "model", tmp_path / "uncapped.gguf", outtype="f32"))
    with LlamaCpp(tmp_path / "uncapped.gguf", context=64) as llama:
        differences = [
            np.abs(llama.next_logprobs(prompt(n), 320) - our_logprobs(model, prompt(n))).max()
            for n in (24, 25, 40)
        ]
    assert differences[0] < 1e-4 < 1e-2 < min(differences[1:])
    monkeypatch.undo()
    save_random_model(tmp_path / "wide", sliding_window=128)
    assert run(GgufConfig(tmp_path / "wide", tmp_path / "w.gguf")).notes == ()


def test_bad_requests(four_bits, tmp_path):
    root, _ = four_bits
    with pytest.raises(UsageError, match=r"exists.*--force"):
        run(GgufConfig(root / "q4", root / "q4.gguf"))
    with pytest.raises(UsageError, match="is a folder; name a file"):
        run(GgufConfig(root / "q4", tmp_path))
    with pytest.raises(UsageError, match="there is no model"):
        run(GgufConfig(tmp_path / "nothing", tmp_path / "m.gguf"))
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    save_random_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, file)
    with pytest.raises(XinslmError, match=r"model.layers.0.mlp.up_proj.weight.*--outtype bf16"):
        run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_run_folder_lists_the_file(four_bits, tmp_path):
    root, _ = four_bits
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    run(GgufConfig(root / "q4", tmp_path / "m.gguf", run=tmp_path / "run"))
    (row,) = json.loads((tmp_path / "run" / "files.json").read_text())["rows"]
    assert row["name"] == "m.gguf" and row["bytes"] == (tmp_path / "m.gguf").stat().st_size


CHILD = """
import os, signal, sys
from pathlib import Path
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run

def stop(progress):
    if progress.done == 10:
        os.kill(os.getpid(), signal.SIGKILL)

run(GgufConfig(Path(sys.argv[1]), Path(sys.argv[2]), force=True), stop)
"""


def test_a_kill_in_the_middle_leaves_the_old_file_whole(four_bits, tmp_path):
    root, _ = four_bits
    (tmp_path / "m.gguf").write_bytes((root / "q4.gguf").read_bytes())
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(root / "q4"), str(tmp_path / "m.gguf")]
    )
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "m.gguf").read_bytes() == (root / "q4.gguf").read_bytes()
    assert make_config().vocab_size == 320 and os.listdir(tmp_path)
