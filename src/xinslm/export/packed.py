"""`xinslm export packed`: a file that the native engine maps and uses in place.

It is a GGUF file with the keys of `export gguf` and the matrices as the engine's tiles
(`native/src/matrix.cpp`), the same codes in another order. Opening it reads and copies nothing, and
two processes share its memory. No other program runs it.
"""

import math
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig, PackedConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.files import new_file
from xinslm.gguf_file import GgufFile, is_gguf, raw_keys
from xinslm.inference.native_engine import build, matrix_shapes, role_of
from xinslm.inference.raw_weights import LAYOUT, LAYOUT_KEY, open_raw
from xinslm.model.gguf_families import FAMILIES
from xinslm.native import library, reason
from xinslm.native.model import NativeModel
from xinslm.progress import Listener, Progress, ignore

_ALIGNMENT = 64
_STRING, _I8 = 8, 24


@dataclass(frozen=True)
class Result:
    """What was written."""

    path: Path
    num_bytes: int
    matrices: int

    def describe(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.path}: {self.num_bytes / 1e6:,.1f} MB, {self.matrices} matrices as the native "
            "engine's tiles"
        )


def run(config: PackedConfig, on_progress: Listener = ignore) -> Result:
    """Write the file and read it back; UsageError for a model that the native engine cannot run."""
    if library() is None:
        raise UsageError(f"export packed needs the native library, which is not there: {reason()}")
    if config.output_path.is_dir():
        raise UsageError(f"--output-path {config.output_path} is a folder; name a file in it")
    if config.output_path.exists() and not config.force:
        raise UsageError(
            f"{config.output_path} exists. Choose another --output-path, or add --force to replace "
            "it"
        )
    if is_gguf(config.model):
        return _pack(config.model, config.output_path, on_progress)
    with tempfile.TemporaryDirectory(dir=config.output_path.resolve().parent) as folder:
        plain = Path(folder) / "model.gguf"
        export_gguf(GgufConfig(config.model, plain), on_progress)
        return _pack(plain, config.output_path, on_progress)


def _pack(source: Path, target: Path, on_progress: Listener) -> Result:
    file, raw = GgufFile(source), open_raw(source)
    if LAYOUT_KEY in file.keys:
        raise UsageError(f"{source} is a packed file already; copy it")
    if raw is None:
        raise UsageError(f"{source}: the native engine does not run this kind of model")
    model = build(raw)
    family = FAMILIES[file.keys["general.architecture"]]
    matrices = {}
    for name in file.tensors:
        own = family.hf_name(name)
        if own is None or (own == "lm_head.weight" and raw.config.tie_word_embeddings):
            continue
        role, layer = role_of(own)
        if role in matrix_shapes(raw.config):
            matrices[name] = (role, layer)
    with new_file(target) as partial:
        _write(partial, file, model, matrices, on_progress)
        _compare(partial, model, list(matrices.values()))
    return Result(target, target.stat().st_size, len(matrices))


def _write(
    path: Path,
    file: GgufFile,
    model: NativeModel,
    matrices: dict[str, tuple[str, int]],
    on_progress: Listener,
) -> None:
    """Write the file: the keys as they are and the layout's, the tensors at multiples of 64."""
    count, keys = raw_keys(file.path)
    extra = [_key(LAYOUT_KEY, _STRING, _text(LAYOUT))]
    if file.keys.get("general.alignment", _ALIGNMENT) != _ALIGNMENT:
        raise XinslmError(f"{file.path}: its alignment is not {_ALIGNMENT} or the usual one")
    if "general.alignment" not in file.keys:
        extra.append(_key("general.alignment", 4, struct.pack("<I", _ALIGNMENT)))
    names = [name for name in file.tensors if name in matrices]
    names += [name for name in file.tensors if name not in matrices]
    infos, at = [], 0
    for name in names:
        tensor = file.tensors[name]
        kind, shape, size = tensor.number, tensor.shape, tensor.n_bytes
        if name in matrices:
            size = len(model.packed(*matrices[name]))
            kind, shape = _I8, (size,)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos.append(_text(name) + dimensions + struct.pack("<IQ", kind, at))
        at += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), count + len(extra))
    with open(path, "wb") as out:
        out.write(head + keys + b"".join(extra) + b"".join(infos))
        for number, name in enumerate(names):
            out.write(bytes(-out.tell() % _ALIGNMENT))
            packed = name in matrices
            data = model.packed(*matrices[name]) if packed else file.tensors[name].raw
            out.write(np.ascontiguousarray(data).data)
            on_progress(Progress("pack", number + 1, len(names), "weights"))
        out.write(bytes(-out.tell() % _ALIGNMENT))


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _compare(path: Path, model: NativeModel, matrices: list[tuple[str, int]]) -> None:
    """XinslmError unless the file gives the very bytes of the packed model."""
    raw = open_raw(path)
    assert raw is not None
    again = build(raw)
    for role, layer in matrices:
        if not np.array_equal(model.packed(role, layer), again.packed(role, layer)):
            raise XinslmError(f"{path}: {role} of layer {layer} was read back with other bytes")
