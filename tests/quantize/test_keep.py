"""`quantize --method keep`: codes of other formats become a quantized folder without loss."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import save_random_model
from xinslm.commands import run
from xinslm.errors import UsageError
from xinslm.export.config import GgufConfig, HfConfig, MlxConfig
from xinslm.model.files import open_model, read_tensors
from xinslm.quantize.config import QuantizeConfig

EXPORTS = {
    "gguf": lambda model, out: GgufConfig(model, out),
    "compressed-tensors": lambda model, out: HfConfig(model, out),
    "gptq": lambda model, out: HfConfig(model, out, format="gptq"),
    "mlx": lambda model, out: MlxConfig(model, out, dtype="bfloat16"),
    "folder": lambda model, out: QuantizeConfig(model, out, method="keep"),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keep")
    save_random_model(folder / "full")
    run(QuantizeConfig(folder / "full", folder / "q", method="rtn"))
    return folder / "q"


@pytest.mark.parametrize("kind", EXPORTS)
def test_codes_come_back_as_they_were(quantized, tmp_path, kind):
    path = tmp_path / ("model.gguf" if kind == "gguf" else "model")
    run(EXPORTS[kind](quantized, path))
    result = run(QuantizeConfig(path, tmp_path / "back", method="keep"))
    expected = load_file(quantized / "quantized.safetensors")
    found = load_file(tmp_path / "back" / "quantized.safetensors")
    for name, tensor in expected.items():
        if "embed" in name and kind in ("compressed-tensors", "gptq"):
            continue  # stored without codes there
        if kind == "mlx" and "norm" in name:
            continue  # rounded to bfloat16 on the way
        assert torch.equal(found[name], tensor), name
    names = {"compressed-tensors": 1, "gptq": 1}
    assert len(result.notes) == names.get(kind, 0)
    same = dict(read_tensors(tmp_path / "back"))
    for name, weight in read_tensors(quantized):
        assert torch.equal(same[name], weight) or (kind == "mlx" and "norm" in name), name
    assert open_model(tmp_path / "back").manifest["bits"] == 4


@pytest.mark.parametrize("kind", ["gguf", "gptq", "mlx", "compressed-tensors"])
def test_other_formats_can_be_exported_again_with_their_codes(quantized, tmp_path, kind):
    path = tmp_path / ("model.gguf" if kind == "gguf" else "model")
    run(EXPORTS[kind](quantized, path))
    run(MlxConfig(path, tmp_path / "mlx"))
    run(MlxConfig(quantized, tmp_path / "expected"))
    found = load_file(tmp_path / "mlx" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "expected" / "model.safetensors").items():
        if "embed" not in name and not (kind == "mlx" and "norm" in name):
            assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def test_codes_that_do_not_fit_are_kept_as_values(quantized, tmp_path):
    """A scale that float16 does not hold, and a column order that blocks do not have."""
    run(HfConfig(quantized, tmp_path / "gptq", format="gptq"))
    path = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(path)
    first, second, third = [n for n in tensors if n.endswith("g_idx")][:3]
    tensors[first] = tensors[first].flip(0)
    scales = second.replace("g_idx", "scales")
    tensors[scales] = tensors[scales].float() * 1.0001
    tensors[third.replace("g_idx", "qzeros")] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "gptq" / "manifest.json").unlink()
    result = run(QuantizeConfig(tmp_path / "gptq", tmp_path / "back", method="keep"))
    assert "and 3 more: no codes on these grids" in result.notes[0]  # and the embedding
    same = dict(read_tensors(tmp_path / "back"))
    for name, weight in read_tensors(tmp_path / "gptq"):
        assert torch.equal(same[name], weight), name


def test_a_model_without_codes_is_refused(tmp_path):
    save_random_model(tmp_path / "full")
    with pytest.raises(UsageError, match="has no weights of Q4_0, Q8_0 or symmetric groups"):
        run(QuantizeConfig(tmp_path / "full", tmp_path / "q", method="keep"))
    assert not (tmp_path / "q").exists()
