"""The packed file: the same bits, mapped in place, and refused where it cannot be used."""

from pathlib import Path

import numpy as np
import pytest

from small_models import FAMILIES, save_quantized, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig, PackedConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.export.packed import run as export_packed
from xinslm.gguf_file import GgufFile
from xinslm.inference.load import native_problem
from xinslm.inference.native_engine import NativeEngine
from xinslm.model.files import open_model

IDS = [5, 9, 17, 200, 31, 7]


@pytest.mark.parametrize("kind", ["tied", "untied", "8-bit", "odd width"])
def test_a_packed_file_gives_the_bits_of_the_gguf_file(tmp_path: Path, kind: str) -> None:
    save_quantized(tmp_path, kind)
    export_gguf(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    result = export_packed(PackedConfig(tmp_path / "m.gguf", tmp_path / "m.packed"))
    assert result.matrices == (15 if kind != "untied" else 16)
    wanted = NativeEngine.load(tmp_path / "m.gguf").start(IDS)
    engine = NativeEngine.load(tmp_path / "m.packed")
    assert np.array_equal(engine.start(IDS), wanted)
    assert engine.tokenizer.encode("The fox") == open_tokenizer(tmp_path / "q").encode("The fox")
    export_packed(PackedConfig(tmp_path / "q", tmp_path / "q.packed"))  # from the folder
    assert np.array_equal(NativeEngine.load(tmp_path / "q.packed").start(IDS), wanted)
    assert not list(tmp_path.glob("tmp*")) and not list(tmp_path.glob(".*partial*"))


def open_tokenizer(path: Path):
    from xinslm.tokenizer.load import load_tokenizer

    return load_tokenizer(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_unquantized_models(tmp_path: Path, family: str) -> None:
    save_random_model(tmp_path / "full", **FAMILIES[family])
    export_gguf(GgufConfig(tmp_path / "full", tmp_path / "m.gguf", outtype="f16"))
    export_packed(PackedConfig(tmp_path / "m.gguf", tmp_path / "m.packed"))
    wanted = NativeEngine.load(tmp_path / "m.gguf").start(IDS)
    assert np.array_equal(NativeEngine.load(tmp_path / "m.packed").start(IDS), wanted)
    assert native_problem(tmp_path / "m.packed", activations="float") == ""


def test_refusals(tmp_path: Path, monkeypatch) -> None:
    save_quantized(tmp_path, "tied")
    path = tmp_path / "m.packed"
    export_packed(PackedConfig(tmp_path / "q", path))
    with pytest.raises(UsageError, match="exists"):
        export_packed(PackedConfig(tmp_path / "q", path))
    with pytest.raises(UsageError, match="is a packed file already"):
        export_packed(PackedConfig(path, tmp_path / "again"))
    with pytest.raises(UsageError, match="packed for the native engine, which alone reads it"):
        open_model(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"tiles of 16 rows")
    path.write_bytes(data[:at] + b"tiles of 99 rows" + data[at + 16 :])
    with pytest.raises(XinslmError, match="packed by another version"):
        NativeEngine.load(path)
    path.write_bytes(data[:-5000])
    with pytest.raises(XinslmError, match="ends at byte"):
        NativeEngine.load(path)
    monkeypatch.setenv("XINSLM_NATIVE", "off")
    with pytest.raises(UsageError, match="needs the native library"):
        export_packed(PackedConfig(tmp_path / "q", tmp_path / "x"))


def test_matrices_lie_on_cache_lines(tmp_path: Path) -> None:
    save_quantized(tmp_path, "tied")
    export_packed(PackedConfig(tmp_path / "q", tmp_path / "m.packed"))
    tensors = GgufFile(tmp_path / "m.packed").tensors.values()
    assert all(tensor.data_offset % 64 == 0 for tensor in tensors)
