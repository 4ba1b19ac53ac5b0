"""Core ML packages: the same codes and scales, and a program that computes what the model does.

coremltools predicts only on macOS, so the program's operations run in `mil.py`.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import QUANTIZED_KINDS, TEXT, save_quantized, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import CoremlConfig
from xinslm.export.coreml import run as coreml
from xinslm.export.coreml.program import causal_mask
from xinslm.export.packing import codes
from xinslm.model.files import load_model, open_model
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.tokenizer.load import load_tokenizer

IDS = torch.from_numpy(np.random.default_rng(0).integers(5, 320, (1, 12)))


def program(folder: Path, wide: bool = False):
    from mil import Program

    return Program(folder / coreml.PACKAGE, wide)


def predict(run, ids, cuts=(5, 6, 7)):
    """Logits of a text that is given in parts: a prompt, then single tokens, then the rest."""
    edges = [0, *cuts, ids.shape[1]]
    parts = [
        run(inputIds=ids[:, start:stop], fullAttentionMask=causal_mask(stop - start, start))
        for start, stop in pairwise(edges)
    ]
    return torch.cat(parts, dim=1).float()


def expected_logits(model: Path, ids):
    with torch.no_grad():
        loaded = load_model(model)
        return loaded.logits(loaded.hidden(ids))


@pytest.fixture(scope="module", params=QUANTIZED_KINDS)
def exported(request, tmp_path_factory):
    """A quantized folder and its package; an odd intermediate size leaves down_proj plain."""
    pytest.importorskip("coremltools")
    folder = tmp_path_factory.mktemp("model")
    save_quantized(folder, request.param)
    result = coreml.run(CoremlConfig(folder / "q", folder / "out", max_seq_length=32))
    return folder / "q", folder / "out", result


def test_codes_and_scales_are_those_of_the_folder(exported):
    model, folder, result = exported
    source = open_model(model)
    found = {
        op.outputs[0].name: op
        for op in program(folder).function.operations
        if op.op_type == "constexpr_blockwise_shift_scale"
    }
    packed = [n for n in source.names if source.stored(n).format in ("q4_0", "q8_0")]
    assert len(found) == len(packed) == sum(n for k, n in result.types.items() if "bit" in k)
    for name in packed:
        op, stored = found[name.replace(".", "_") + "_cast_fp16"], source.stored(name)
        assert op.offset is None
        assert np.array_equal(op.data.val, codes(stored).numpy()), name
        assert np.array_equal(op.scale.val, stored.scales.numpy()), name
        assert op.scale.val.dtype == np.float16
    size = (folder / coreml.PACKAGE / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    # a second table of the embedding, or codes of 8 bits instead of 4, would not fit
    needed = sum(
        source.stored(n).data.nbytes + source.stored(n).scales.nbytes if n in packed else 2 * w
        for n, w in ((n, int(np.prod(source.shape_of(n)))) for n in source.names)
    )
    assert size < needed + 320 * 64


def test_the_program_computes_what_the_model_does(exported):
    model, folder, _ = exported
    expected = expected_logits(model, IDS)
    wide = program(folder, wide=True)
    # the tables of the rotation and the norms are rounded to float16
    assert (predict(wide, IDS) - expected).abs().max() < 5e-3 * expected.std()
    half = program(folder)
    assert (predict(half, IDS) - expected).abs().max() < 0.05 * expected.std()
    assert half.states["keyCache"].abs().sum() > 0


def test_what_a_program_that_loads_it_needs_is_there(exported):
    from coremltools import utils

    model, folder, result = exported
    spec = utils.load_spec(str(folder / coreml.PACKAGE))
    description = spec.description
    assert [i.name for i in description.input] == ["inputIds", "fullAttentionMask"]
    assert [s.name for s in description.state] == ["keyCache", "valueCache"]
    assert [o.name for o in description.output] == ["logits"]
    facts = description.metadata.userDefined
    assert facts["xinslm.context_length"] == "32" and facts["xinslm.eos_token_id"] == "1"
    assert facts["xinslm.compute_units"] == "cpuAndGPU"
    assert "computeUnits = .cpuAndGPU" in description.metadata.shortDescription
    assert all(feature.shortDescription for feature in description.input)
    copy, original = load_tokenizer(folder), load_tokenizer(model)
    assert list(copy.encode(TEXT)) == list(original.encode(TEXT))
    assert copy.chat_template == original.chat_template
    assert result.length == 32 and result.state_bytes == 2 * 2 * 2 * 32 * 32 * 2
    assert "not run" in result.describe() and "32 tokens" in result.describe()


def test_a_model_without_codes_is_written_in_float16(tmp_path):
    pytest.importorskip("coremltools")
    reference = save_random_model(tmp_path / "full")
    tensors = load_file(tmp_path / "full" / "model.safetensors")
    # one norm of ones, which coremltools leaves out, and two weights that are equal
    tensors["model.norm.weight"][:] = 1
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    tensors[second] = tensors[first].clone()
    tensors["model.layers.0.input_layernorm.weight"][3] = 2e-8
    save_file(tensors, tmp_path / "full" / "model.safetensors", {"format": "pt"})
    result = coreml.run(CoremlConfig(tmp_path / "full", tmp_path / "out", compute_units="all"))
    assert result.types == {"float16": len(tensors)} and result.rounded > 0
    assert result.length == reference.config.max_position_embeddings
    expected = expected_logits(tmp_path / "full", IDS)
    difference = predict(program(tmp_path / "out"), IDS) - expected
    assert difference.abs().max() < 0.05 * expected.std()


def test_large_states_do_not_overflow(tmp_path):
    """The square of 256 is beyond float16."""
    pytest.importorskip("coremltools")
    save_random_model(tmp_path / "full", tie_word_embeddings=False, num_hidden_layers=1)
    tensors = load_file(tmp_path / "full" / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 3000
    save_file(tensors, tmp_path / "full" / "model.safetensors", {"format": "pt"})
    quantize(QuantizeConfig(tmp_path / "full", tmp_path / "q", method="rtn"))
    coreml.run(CoremlConfig(tmp_path / "q", tmp_path / "out"))
    expected = expected_logits(tmp_path / "q", IDS)
    found = predict(program(tmp_path / "out"), IDS)
    assert (found - expected).abs().max() < 0.05 * expected.std()


def test_ids_beyond_16_bits_find_their_row(tmp_path):
    pytest.importorskip("coremltools")
    save_random_model(tmp_path / "full", vocab_size=66_000, num_hidden_layers=1)
    coreml.run(CoremlConfig(tmp_path / "full", tmp_path / "out"))
    ids = torch.tensor([[65_999, 65_537, 3, 65_535]])
    expected = expected_logits(tmp_path / "full", ids)
    found = predict(program(tmp_path / "out", wide=True), ids, cuts=(2,))
    assert (found - expected).abs().max() < 0.02 * expected.std()


def test_a_wrong_code_is_found_before_the_folder_is_there(tmp_path, monkeypatch):
    pytest.importorskip("coremltools")
    build = coreml.build

    def broken(model, weights):
        model = build(model, weights)
        weight = model.get_parameter("model.layers.0.self_attn.k_proj.weight").data
        weight[0, :2] = weight[0, :2].flip(0)
        return model

    save_random_model(tmp_path / "full", num_hidden_layers=1)
    quantize(QuantizeConfig(tmp_path / "full", tmp_path / "q", method="rtn"))
    monkeypatch.setattr(coreml, "build", broken)
    with pytest.raises(XinslmError, match=r"k_proj.weight, codes: 2 values differ"):
        coreml.run(CoremlConfig(tmp_path / "q", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "q"]


def test_the_neural_engine_is_refused_for_codes(exported, tmp_path):
    model, _, _ = exported
    refusal = r"Neural Engine.*wrong numbers.*use cpu-and-gpu, or cpu-and-neural-engine"
    with pytest.raises(UsageError, match=refusal):
        coreml.run(CoremlConfig(model, tmp_path / "out", compute_units="all"))
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path):
    pytest.importorskip("coremltools")
    save_random_model(tmp_path / "full", sliding_window=16)
    full, out = tmp_path / "full", tmp_path / "out"
    with pytest.raises(UsageError, match=r"sliding window of 16.*--max-seq-length 16"):
        coreml.run(CoremlConfig(full, out, max_seq_length=17))
    with pytest.raises(UsageError, match=r"context of 128 tokens: pass --max-seq-length 128"):
        coreml.run(CoremlConfig(full, out, max_seq_length=129))
    with pytest.raises(UsageError, match=r"max_seq_length is 1, but must be at least 2"):
        coreml.run(CoremlConfig(full, out, max_seq_length=1))
    with pytest.raises(UsageError, match=r"choose a name without .mlpackage"):
        coreml.run(CoremlConfig(full, tmp_path / "x.mlpackage"))
    with pytest.raises(UsageError, match="already holds something"):
        coreml.run(CoremlConfig(full, full))
    tensors = load_file(full / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, full / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"up_proj.weight' has values beyond float16"):
        coreml.run(CoremlConfig(full, out))
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(XinslmError, match="model_type is 'gemma'"):
        coreml.run(CoremlConfig(full, out))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_without_coremltools_the_message_has_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    save_random_model(tmp_path / "full")
    with pytest.raises(UsageError, match=r"pip install 'xinslm\[coreml\]'"):
        coreml.run(CoremlConfig(tmp_path / "full", tmp_path / "out"))


def test_a_window_bounds_the_states(tmp_path):
    pytest.importorskip("coremltools")
    save_random_model(tmp_path / "full", sliding_window=16, num_hidden_layers=1)
    result = coreml.run(CoremlConfig(tmp_path / "full", tmp_path / "out"))
    assert result.length == 16
    expected = expected_logits(tmp_path / "full", IDS)
    difference = predict(program(tmp_path / "out"), IDS) - expected
    assert difference.abs().max() < 0.05 * expected.std()
