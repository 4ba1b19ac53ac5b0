"""Quantized folders as transformers and mlx-lm read them: the same weights, the same logits."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from small_models import QUANTIZED_KINDS, TEXT, save_quantized, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export import packed_folder
from xinslm.export.all import run as run_all
from xinslm.export.config import AllConfig, HfConfig, MlxConfig
from xinslm.export.packed_folder import run_hf, run_mlx
from xinslm.model.files import load_model, read_tensors
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize

IDS = np.random.default_rng(0).integers(5, 320, 24)


@pytest.fixture(scope="module", params=QUANTIZED_KINDS)
def model(request, tmp_path_factory):
    """A quantized folder; an intermediate size that is no multiple of 32 leaves down_proj plain."""
    folder = tmp_path_factory.mktemp("model")
    save_quantized(folder, request.param)
    return folder / "q"


def our_logits(folder):
    with torch.no_grad():
        model = load_model(folder)
        return model.logits(model.hidden(torch.tensor(IDS[None])))[0]


def test_transformers_reads_the_same_weights(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    result = run_hf(HfConfig(model, tmp_path / "hf"))
    assert "all" in result.describe() and result.rounded == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(torch.tensor(IDS[None])).logits[0]
    assert torch.allclose(logits, our_logits(model), atol=2e-5)
    weights = dict(loaded.named_parameters())  # decompressed by the first call
    for name, weight in read_tensors(model):
        assert torch.equal(weights[name].data, weight), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode(TEXT) == AutoTokenizer.from_pretrained(model).encode(TEXT)


def test_scales_have_both_signs(model):
    """Else the tests here would not notice a runtime that takes scales for positive."""
    formats = json.loads((model / "manifest.json").read_text())["formats"]
    tensors = load_file(model / "quantized.safetensors")
    found = [tensors[f"{stem}.scales"] for stem, kind in formats.items() if kind == "q4_0"]
    assert all(scales.min() < 0 < scales.max() for scales in found)
    assert found or "q4_0" not in formats.values()


def test_mlx_reads_the_same_weights(model, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    run_mlx(MlxConfig(model, tmp_path / "mlx"))
    loaded, _ = utils.load_model(tmp_path / "mlx")
    logits = np.array(loaded(mx.array(IDS[None].astype(np.int32)))[0].astype(mx.float32))
    assert np.abs(logits - our_logits(model).numpy()).max() < 2e-4
    expected = dict(read_tensors(model))
    count = 0
    for name, module in loaded.named_modules():
        if hasattr(module, "scales"):
            weight = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
            assert np.array_equal(np.array(weight), expected[f"{name}.weight"].numpy()), name
            count += 1
    formats = json.loads((model / "manifest.json").read_text())["formats"]
    assert count == sum(kind in ("q4_0", "q8_0") for kind in formats.values())


def test_gptq_is_decoded_by_its_definition(model, tmp_path):
    formats = json.loads((model / "manifest.json").read_text())["formats"]
    layers = [k for s, k in formats.items() if s.startswith("model.layers.") and "norm" not in s]
    config = HfConfig(model, tmp_path / "gptq", format="gptq")
    if set(layers) != {"q4_0"}:
        with pytest.raises(UsageError, match=r"not in 4 bits.*compressed-tensors"):
            run_hf(config)
        assert not (tmp_path / "gptq").exists()
        return
    run_hf(config)
    expected = dict(read_tensors(model))
    with safe_open(tmp_path / "gptq" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for stem in [s for s in formats if f"{s}.qweight" in names]:
            words, zeros, scales, group = (
                file.get_tensor(f"{stem}.{part}").numpy()
                for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            columns, rows = 8 * words.shape[0], words.shape[1]
            weight = np.empty((rows, columns), np.float32)
            for column in range(columns):  # one value at a time, as the format is described
                code = words[column // 8].view(np.uint32) >> (4 * (column % 8)) & 15
                g = group[column]
                zero = np.array(
                    [
                        zeros[g, row // 8].view(np.uint32) >> (4 * (row % 8)) & 15
                        for row in range(rows)
                    ]
                )
                weight[:, column] = (code.astype(int) - zero.astype(int) - 1) * scales[g]
            assert np.array_equal(weight, expected[f"{stem}.weight"].numpy()), stem
        assert not any("lm_head.q" in name for name in names)


def test_the_rotation_reaches_runtimes_that_do_not_read_rope_parameters(tmp_path):
    """transformers 5 writes theta and its rescaling in `rope_parameters` alone."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    save_random_model(tmp_path / "full", rope_theta=300.0, rope_scaling=scaling)
    path = tmp_path / "full" / "config.json"
    config = json.loads(path.read_text())
    config = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    path.write_text(json.dumps(config | {"rope_parameters": scaling | {"rope_theta": 300.0}}))
    quantize(QuantizeConfig(tmp_path / "full", tmp_path / "q", method="rtn"))
    run_mlx(MlxConfig(tmp_path / "q", tmp_path / "mlx"))
    loaded, _ = utils.load_model(tmp_path / "mlx")
    logits = np.array(loaded(mx.array(IDS[None].astype(np.int32)))[0].astype(mx.float32))
    assert np.abs(logits - our_logits(tmp_path / "q").numpy()).max() < 2e-4


def test_a_window_that_mlx_lm_ignores_is_said(tmp_path):
    save_random_model(tmp_path / "full", sliding_window=16)
    assert "up to 16 tokens" in run_mlx(MlxConfig(tmp_path / "full", tmp_path / "mlx")).describe()
    assert "note" not in run_hf(HfConfig(tmp_path / "full", tmp_path / "hf")).describe()


def test_all_formats_at_once(model, tmp_path):
    result = run_all(AllConfig(model, tmp_path / "all"))
    files = ["Modelfile", "README.md", "hf", "manifest.json", "mlx", "model.gguf"]
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == files
    expected = dict(read_tensors(model))
    for name in ("hf", "mlx", "model.gguf"):
        path = tmp_path / "all" / name
        assert all(torch.equal(w, expected[key]) for key, w in read_tensors(path)), name
    assert result.describe().count("output") == 4
    with pytest.raises(UsageError, match="already holds something"):
        run_all(AllConfig(model, tmp_path / "all"))


def test_half_precision_rounds_only_what_has_no_codes(model, tmp_path):
    result = run_hf(HfConfig(model, tmp_path / "hf", dtype="bfloat16"))
    assert 0 < result.rounded < result.weights
    assert "codes and scales equal" in result.describe()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_wrong_word_is_found_before_the_folder_is_there(model, tmp_path, monkeypatch):
    class Broken(packed_folder.Mlx):
        def tensors(self, stem, weight, dtype):
            found = super().tensors(stem, weight, dtype)
            if "k_proj" in stem:
                found[f"{stem}.weight"].view(torch.int32)[0, 0] ^= 1
            return found

    monkeypatch.setattr(packed_folder, "Mlx", Broken)
    with pytest.raises(XinslmError, match=r"k_proj.weight: 1 values differ"):
        run_mlx(MlxConfig(model, tmp_path / "mlx"))
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path):
    save_random_model(tmp_path / "full")
    with pytest.raises(UsageError, match="is not quantized: run `xinslm quantize` first"):
        run_hf(HfConfig(tmp_path / "full", tmp_path / "out", format="gptq"))
    quantize(QuantizeConfig(tmp_path / "full", tmp_path / "q", method="rtn"))
    with pytest.raises(UsageError, match="already holds something"):
        run_mlx(MlxConfig(tmp_path / "q", tmp_path / "full"))
    with pytest.raises(UsageError, match=r"would|lies in"):
        run_mlx(MlxConfig(tmp_path / "q", tmp_path / "q", force=True))
    weights = load_file(tmp_path / "q" / "quantized.safetensors")
    name = next(n for n in weights if n.endswith("k_proj.scales"))
    weights[name][:] = 60000.0
    save_file(weights, tmp_path / "q" / "quantized.safetensors")
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    manifest["files"].pop("quantized.safetensors", None)
    (tmp_path / "q" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="too large for float16: use --dtype float32"):
        run_mlx(MlxConfig(tmp_path / "q", tmp_path / "mlx", dtype="float16"))
