"""A model's shape and the bytes of its weights, read without PyTorch.

For a program that only runs a model, importing PyTorch would be most of the time to the first
token. Read here are a quantized folder, a Hugging Face folder of float32, float16 or bfloat16, and
a GGUF file of F32, F16, BF16, Q4_0, Q4_1 or Q8_0. Any other model of a LLaMA shape comes through
`open_model`, with PyTorch: codes where it has codes of our grids, else float32.
"""

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.errors import XinslmError
from xinslm.files import read_json, read_manifest
from xinslm.gguf_file import GgufTensor, is_gguf, open_gguf, release
from xinslm.model.config import ModelConfig, UnsupportedModelError
from xinslm.model.gguf_families import FAMILIES, read_settings
from xinslm.model.names import (
    CONFIG,
    QUANTIZED_BY,
    QUANTIZED_KIND,
    QUANTIZED_VERSION,
    QUANTIZED_WEIGHTS,
    parameter_name,
)
from xinslm.model.weight_files import safetensors_files
from xinslm.native.model import BF16, F16, F32, Q4_APART, Q8_APART, READS, Weight
from xinslm.places import find

LAYOUT_KEY, LAYOUT = "xinslm.layout", "tiles of 16 rows"
"""Key and value of a file of `export packed`, whose matrices are the library's tiles."""
_TIED = ("model.embed_tokens.weight", "lm_head.weight")
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {"F32": (F32, 4), "F16": (F16, 2), "BF16": (BF16, 2), "U8": (None, 1), "I8": (None, 1)}
_APART = {"q4_0": (Q4_APART, "U8"), "q8_0": (Q8_APART, "I8")}
_I8 = 24
_MOST_DIMENSIONS = 8
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


@dataclass(frozen=True)
class RawModel:
    """What the native engine needs of a model."""

    config: ModelConfig
    interleaved: bool
    """Whether query and key rows are in the order of LLaMA's GGUF files."""
    names: list[str]
    """Hugging Face's names of the weights."""
    read: Callable[[str], Weight]
    """One weight, as a map of its file."""
    coded: frozenset[str]
    """Names of the weights with 4-bit or 8-bit codes, whose inputs are rounded."""
    frequency_divisors: np.ndarray | None = None
    """What divides each rotary frequency, float32 (head size / 2,), if the file says so."""
    forget: Callable[[str], None] = lambda name: None
    """Gives back the memory that the map of a weight takes, until it is read again."""
    is_packed: bool = False
    """Whether matrices are the library's tiles, of type I8 and one dimension."""


def open_raw(name: Path | str) -> RawModel | None:
    """Open a model; None if the native engine cannot express it.

    UsageError or XinslmError for what is no model, or is damaged.
    """
    return _open(name) or _through_pytorch(name)


def _open(name: Path | str) -> RawModel | None:
    """Open what is read without PyTorch."""
    path = Path(name)
    if is_gguf(path):
        return _gguf(path)
    path = find(name, "model", lambda place: (place / CONFIG).is_file(), _HUB_FILES)
    if not (path / CONFIG).is_file():
        return None
    settings = read_json(path / CONFIG)
    if not isinstance(settings, dict):
        return None
    try:
        config = ModelConfig.from_hf(settings, str(path / CONFIG))
    except UnsupportedModelError:
        return None
    if (path / QUANTIZED_WEIGHTS).is_file():
        return _quantized(path, config)
    return _folder(path, config)


_COMPARED = 1 << 24
"""Bytes of two arrays that are compared at a time."""


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of bytes are equal."""
    parts = (slice(at, at + _COMPARED) for at in range(0, len(a), _COMPARED))
    return len(a) == len(b) and all(np.array_equal(a[part], b[part]) for part in parts)


def _folder(path: Path, config: ModelConfig) -> RawModel | None:
    tensors: dict[str, tuple[_Safetensors, str]] = {}
    for place in safetensors_files(path):
        file = _Safetensors(place)
        tensors |= {tensor: (file, tensor) for tensor in file.names}
    tensors = {name: place for name, place in tensors.items() if not name.endswith(".inv_freq")}
    kinds = {file.dtype(name) for file, name in tensors.values()}
    if not kinds <= {"F32", "F16", "BF16"}:
        return None
    tables = [file.bytes_of(name) for file, name in tensors.values() if name in _TIED]
    if config.tie_word_embeddings and len(tables) == 2 and not _same(tables[0], tables[1]):
        return None  # which one is meant is a question of values

    def read(name: str) -> Weight:
        file, tensor = tensors[name]
        kind, shape = _DTYPES[file.dtype(tensor)][0], file.shape(tensor)
        assert kind is not None
        return Weight(kind, _two(shape), file.bytes_of(tensor))

    def forget(name: str) -> None:
        file, tensor = tensors[name]
        file.forget(tensor)

    return RawModel(config, False, list(tensors), read, frozenset(), forget=forget)


def _quantized(path: Path, config: ModelConfig) -> RawModel:
    manifest = read_manifest(path, QUANTIZED_KIND, QUANTIZED_VERSION, QUANTIZED_BY)
    formats = manifest.get("formats")
    if not isinstance(formats, dict) or not all(isinstance(kind, str) for kind in formats.values()):
        raise XinslmError(
            f"{path / 'manifest.json'}: 'formats' is missing or damaged; run `{QUANTIZED_BY}`"
        )
    file = _Safetensors(path / QUANTIZED_WEIGHTS)

    def read(name: str) -> Weight:
        stem = name.removesuffix(".weight")
        kind = formats.get(stem)
        if kind in ("f16", "f32"):
            if file.dtype(name) != kind.upper():
                raise XinslmError(
                    f"{path}: '{name}' is {file.dtype(name)}, but the manifest says {kind}; "
                    "quantize again"
                )
            number = F16 if kind == "f16" else F32
            return Weight(number, _two(file.shape(name)), file.bytes_of(name))
        if kind not in _APART:
            raise XinslmError(f"{path}: '{stem}' has the unknown format {kind!r}")
        number, dtype = _APART[kind]
        codes, scales = f"{stem}.codes", f"{stem}.scales"
        if file.dtype(codes) != dtype or file.dtype(scales) != "F16":
            raise XinslmError(f"{path}: '{stem}' has codes or scales of another type")
        rows, groups = _two(file.shape(scales))
        values = file.bytes_of(scales).view(np.float16)
        if not np.isfinite(values).all():
            raise XinslmError(f"{path}: '{scales}' holds NaN or infinity; quantize again")
        return Weight(number, (rows, 32 * groups), file.bytes_of(codes), values)

    coded = frozenset(parameter_name(name) for name, kind in formats.items() if kind in _APART)
    names = [parameter_name(name) for name in formats]
    return RawModel(
        config,
        False,
        names,
        read,
        coded,
        forget=lambda name: file.forget(f"{name.removesuffix('.weight')}.codes"),
    )


def _gguf(path: Path) -> RawModel | None:
    file = open_gguf(path)
    family = FAMILIES.get(str(file.keys.get("general.architecture")))
    if family is None or family.norm_offset:
        return None
    tensors = dict(file.tensors)
    divisors = tensors.pop(_ROPE_FACTORS, None)
    layout = file.keys.get(LAYOUT_KEY)
    if layout not in (None, LAYOUT):
        raise XinslmError(f"{path} was packed by another version of xinslm; pack the model again")
    reads = READS | {_I8} if layout else READS
    if not {tensor.number for tensor in tensors.values()} <= reads:
        return None
    try:
        config = ModelConfig.from_hf(read_settings(file), str(path))
    except UnsupportedModelError:
        return None
    own = {name: family.hf_name(name) for name in tensors}
    places = {ours: name for name, ours in own.items() if ours is not None}
    if len(places) < len(own):
        return None

    def read(name: str) -> Weight:
        tensor = tensors[places[name]]
        return Weight(tensor.number, _two(tuple(reversed(tensor.shape))), tensor.raw)

    factors = None if divisors is None else _divisors(path, divisors, config)
    plain = {F32, F16, BF16}
    if layout:  # tiles of codes take at most 1.1 bytes a weight
        plain |= {_I8} if _bytes_a_weight(path, config, tensors, places) > 1.5 else set()
    coded = frozenset(n for n, place in places.items() if tensors[place].number not in plain)
    return RawModel(
        config,
        family.is_permuted,
        list(places),
        read,
        coded,
        factors,
        lambda name: tensors[places[name]].forget(),
        layout is not None,
    )


def _divisors(path: Path, tensor: GgufTensor, config: ModelConfig) -> np.ndarray:
    if tensor.number == F32 and tensor.shape == (config.head_dim // 2,):
        values = np.array(tensor.data, np.float32)
        if np.isfinite(values).all() and (values > 0).all():
            return values
    raise XinslmError(
        f"{path}: '{_ROPE_FACTORS}' is not {config.head_dim // 2} numbers above 0; copy or "
        "download the file again"
    )


def _bytes_a_weight(
    path: Path, config: ModelConfig, tensors: dict[str, GgufTensor], places: dict[str, str]
) -> float:
    name = "model.layers.0.mlp.down_proj.weight"
    if name not in places:
        raise XinslmError(f"{path} has no '{name}'; pack the model again")
    size = tensors[places[name]].n_bytes
    return size / (config.hidden_size * config.intermediate_size)


def _through_pytorch(name: Path | str) -> RawModel | None:
    from xinslm.model.files import open_model

    source = open_model(name)
    if not source.is_own:
        return None
    source.require_tied()

    def read(name: str) -> Weight:
        shape = _two(source.shape_of(name))
        stored = source.stored(name)
        if stored is None or stored.scales is None:
            return Weight(F32, shape, source.tensor(name).float().contiguous().numpy())
        number = _APART[stored.format][0]
        return Weight(number, shape, stored.data.numpy(), stored.scales.contiguous().numpy())

    names = [name for name in source.names if not name.endswith(".inv_freq")]
    coded = frozenset(
        name for name in names if (s := source.stored(name)) is not None and s.scales is not None
    )
    return RawModel(source.config, False, names, read, coded)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a vector is one row, and so is a single number."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


_WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What a header raises that is no JSON, or is JSON of another form."""


class _Safetensors:
    """The header and the map of a safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._map[:8], "little")
            if length > len(self._map) - 8:
                raise ValueError("its header is cut off")
            header = json.loads(self._map[8 : 8 + length])
            self._start = 8 + length
            self._entries = {
                name: entry for name, entry in header.items() if name != "__metadata__"
            }
            for name, entry in self._entries.items():
                self._check(name, entry)
        except _WRONG as error:
            raise XinslmError(
                f"{path} is not a complete safetensors file ({error}); copy or create it again"
            ) from None
        self.names = list(self._entries)

    def _check(self, name: str, entry: dict[str, Any]) -> None:
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"'{name}' has {len(shape):,} dimensions")
        if not all(isinstance(size, int) and size >= 0 for size in (begin, end, *shape)):
            raise ValueError(f"'{name}' has an odd shape or place")
        if not begin <= end <= len(self._map) - self._start:
            raise ValueError(f"'{name}' ends behind the file")
        width = _DTYPES.get(entry["dtype"], (None, None))[1]
        if width is not None and end - begin != width * math.prod(shape):
            raise ValueError(f"the bytes of '{name}' do not match its shape")

    def dtype(self, name: str) -> str:
        """Name of a tensor's type; XinslmError if there is no such tensor."""
        if name not in self._entries:
            raise XinslmError(f"{self.path} has no '{name}'; copy or create it again")
        return str(self._entries[name]["dtype"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        self.dtype(name)
        return tuple(self._entries[name]["shape"])

    def bytes_of(self, name: str) -> np.ndarray:
        """A map of a tensor's bytes, uint8."""
        self.dtype(name)
        begin, end = self._entries[name]["data_offsets"]
        return np.frombuffer(self._map, np.uint8, end - begin, self._start + begin)

    def forget(self, name: str) -> None:
        """Let the system take back the memory of a tensor's map, if there is such a tensor."""
        if name in self._entries:
            begin, end = self._entries[name]["data_offsets"]
            release(self._map, self._start + begin, self._start + end)
