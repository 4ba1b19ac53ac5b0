"""Models that an export could turn into a silently wrong file, and exports that do not end."""

import resource

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from small_models import save_random_model, tree_hash
from xinslm.commands import run
from xinslm.errors import XinslmError
from xinslm.export.config import GgufConfig, HfConfig, ImportConfig, MlxConfig
from xinslm.inference.raw_weights import open_raw
from xinslm.model.files import load_model, open_model, read_tensors
from xinslm.quantize.config import QuantizeConfig

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
EXPORTS = {
    "gguf": lambda model, out, **more: GgufConfig(model, out, **more),
    "hf": lambda model, out, **more: HfConfig(model, out, **more),
    "gptq": lambda model, out, **more: HfConfig(model, out, format="gptq", **more),
    "mlx": lambda model, out, **more: MlxConfig(model, out, **more),
    "import": lambda model, out, **more: ImportConfig(model, out, **more),
}


def make(folder, change=None, **shape):
    """A model; `change` edits the dictionary of its weights."""
    save_random_model(folder, **shape)
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with a tied table, and its 4-bit folder."""
    root = tmp_path_factory.mktemp("bad-models")
    make(root / "full")
    run(QuantizeConfig(root / "full", root / "q", method="rtn"))
    return root


@pytest.mark.parametrize("kind", ["gguf", "hf", "mlx", "import"])
def test_an_untied_head_under_a_tied_configuration_is_refused(tmp_path, kind):
    """transformers 5 takes the head of the file, other programs the embedding."""
    make(tmp_path / "model", lambda tensors: tensors.update({HEAD: tensors[TABLE] * 1.5}))
    with pytest.raises(XinslmError, match=r"ties the LM head .* another 'lm_head\.weight'"):
        run(EXPORTS[kind](tmp_path / "model", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("read", [load_model, open_raw], ids=["PyTorch", "native engine"])
def test_readers_refuse_it_too_and_take_a_copy(tmp_path, read):
    tensors = make(tmp_path / "model", lambda tensors: tensors.update({HEAD: tensors[TABLE] * 1}))
    read(tmp_path / "model")
    tensors[HEAD][319, 63] += 1e-3
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(XinslmError, match=r"ties the LM head .* another 'lm_head\.weight'"):
        read(tmp_path / "model")


@pytest.mark.parametrize("kind", ["hf", "gptq", "mlx", "import"])
def test_a_tied_table_is_written_once(models, tmp_path, kind):
    run(EXPORTS[kind](models / "q", tmp_path / "out"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any("lm_head" in name for name in names)
    assert len({name.rsplit(".", 1)[0] for name in names}) == 20
    assert open_model(tmp_path / "out").settings["tie_word_embeddings"] is True


def test_matrices_that_no_grid_fits_reach_every_format_exactly(tmp_path):
    """Values beyond float16 and far below its scales are float32 in a quantized folder."""
    big, small = "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[big] *= 1e7
        tensors[small] *= 1e-8

    expected = make(tmp_path / "full", change)
    run(QuantizeConfig(tmp_path / "full", tmp_path / "q", method="rtn"))
    run(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    written = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    for name, theirs in ((big, "blk.0.attn_v.weight"), (small, "blk.1.ffn_up.weight")):
        assert written[theirs].tensor_type.name == "F32"
        values = quants.dequantize(written[theirs].data, written[theirs].tensor_type)
        assert np.array_equal(values, expected[name].numpy())
    for kind in ("hf", "mlx"):
        run(EXPORTS[kind](tmp_path / "q", tmp_path / kind))
        found = load_file(tmp_path / kind / "model.safetensors")
        assert torch.equal(found[big], expected[big]), kind
        assert torch.equal(found[small], expected[small]), kind
        with pytest.raises(XinslmError, match=rf"'{big}' has values beyond float16"):
            run(EXPORTS[kind](tmp_path / "q", tmp_path / f"{kind}16", dtype="float16"))


def stop(progress):
    if progress.done == 10:
        raise KeyboardInterrupt


@pytest.mark.parametrize("end", ["interrupt", "full"])
@pytest.mark.parametrize("kind", EXPORTS)
def test_an_end_in_the_middle_leaves_the_old_output(models, tmp_path, kind, end):
    """Ctrl-C, and a disk that is full (a file size limit stands in); numpy gives no reason then."""
    out = tmp_path / "out"
    run(EXPORTS[kind](models / "q", out))
    before = out.read_bytes() if out.is_file() else tree_hash(out)
    config = EXPORTS[kind](models / "q", out, force=True)
    if end == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            run(config, on_progress=stop)
    else:
        error, message = OSError, "File too large"
        if kind == "gguf":
            error, message = XinslmError, "could not be written to its end .* the disk is full"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(error, match=message):
                run(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out.read_bytes() if out.is_file() else tree_hash(out)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(torch.isfinite(weight).all() for _, weight in read_tensors(out))
