"""Open a GGUF file safely: its keys, and its tensors as memory maps.

The header is read here, because a program that only runs a model should start at once: the `gguf`
package takes half a second to import and to read a vocabulary. That package is still what knows
the quantized types beyond those listed here. What llama.cpp refuses is refused: split files, and
tensors that overlap, are misaligned or end behind the file.

Format: GGUF specification, version 2 and 3, little-endian.
"""

import functools
import itertools
import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError

_AGAIN = "the file is damaged. Copy or download it again"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""struct's letters of the value types that are numbers."""
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MOST_NESTED = 8
_KEYS_BEGIN = 24
"""Byte after the magic number, the version and two counts."""
_PLAIN = {0: "<f4", 1: "<f2", 24: "i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}
"""NumPy's types of the tensors that are plain numbers."""
_BLOCKS = {2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 30: (1, 2)}
"""Weights and bytes of a block of the commonest other types; `gguf` knows the rest."""


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its first bytes, or is named like one."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def release(file: mmap.mmap, begin: int, end: int) -> None:
    """Let the system take back the memory of the whole pages of a map in [begin, end)."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED, first, length)


class Strings(Sequence[str]):
    """Strings of a file, decoded when they are asked for: a vocabulary has a hundred thousand, and
    a program that encodes in the native library needs few of them.
    """

    def __init__(self, file: mmap.mmap, begin: int, end: int, count: int) -> None:
        self._file, self._begin, self._end, self._count = file, begin, end, count

    @property
    def raw(self) -> np.ndarray:
        """Their bytes, uint8, each after the 8 bytes of its length, as a map of the file."""
        return np.frombuffer(self._file, np.uint8, self._end - self._begin, self._begin)

    def _decoded(self) -> Iterator[str]:
        at, length = self._begin, struct.Struct("<Q").unpack_from
        for _ in range(self._count):
            begin = at + 8
            at = begin + length(self._file, at)[0]
            yield self._file[begin:at].decode("utf-8", "replace")

    @functools.cached_property
    def _list(self) -> list[str]:
        return list(self._decoded())

    def pick(self, places: Sequence[int]) -> dict[int, str]:
        """The strings at some places in [0, len), read one after the other up to the last."""
        wanted = set(places)
        first = itertools.islice(self._decoded(), max(wanted, default=-1) + 1)
        return {place: text for place, text in enumerate(first) if place in wanted}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        return self._list[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._list)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._list == list(other)

    __hash__ = None  # type: ignore[assignment]


class GgufTensor:
    """A tensor of a file: where it is, and how it is stored."""

    def __init__(
        self, name: str, number: int, shape: tuple[int, ...], offset: int, file: mmap.mmap
    ) -> None:
        self.name, self.number, self.shape = name, number, shape
        """llama.cpp's number of the type; the shape is in its order, columns first."""
        self.data_offset = offset
        """Byte of the file at which it begins."""
        self._file = file
        size, block_bytes = _block(number)
        if shape[0] % size:
            raise ValueError(f"'{name}' has rows of {shape[0]} weights, not whole blocks of {size}")
        self._row_bytes = shape[0] // size * block_bytes
        self.n_bytes = self._row_bytes * math.prod(shape[1:])

    @property
    def tensor_type(self) -> Any:
        """`gguf.GGMLQuantizationType` of it."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.number)

    @property
    def raw(self) -> np.ndarray:
        """Its bytes, uint8 (n_bytes,), as a map of the file."""
        return np.frombuffer(self._file, np.uint8, self.n_bytes, self.data_offset)

    def forget(self) -> None:
        """Let the system take back the memory that the map takes; reading brings it back."""
        release(self._file, self.data_offset, self.data_offset + self.n_bytes)

    @property
    def data(self) -> np.ndarray:
        """A map of the file: numbers in NumPy's order of the shape, or bytes (..., row bytes)."""
        rows = tuple(reversed(self.shape[1:]))
        if self.number in _PLAIN:
            return self.raw.view(_PLAIN[self.number]).reshape(*rows, self.shape[0])
        return self.raw.reshape(*rows, self._row_bytes)


class GgufFile:
    """The keys and tensors of a file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        self.path = path
        try:
            header = _Header(path)
        except _UnknownTypeError as error:
            raise UsageError(
                f"{path} has weights of a type that the installed gguf package does not know "
                f"({error}). Update it, or take another quantization"
            ) from None
        except (ValueError, OSError, struct.error, OverflowError, MemoryError) as error:
            raise XinslmError(
                f"{path} is not a whole GGUF file ({error}); copy or download it again"
            ) from None
        self.keys = header.keys
        parts = self.keys.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise UsageError(
                f"{path} is one of several parts; join them first: llama-gguf-split "
                f"--merge {path.name} OUT"
            )
        _require_sound_places(header, path)
        self.tensors = {tensor.name: tensor for tensor in header.tensors}


def open_gguf(path: Path) -> GgufFile:
    """Open a file, or give the one of the last call if it has not changed: the model and its
    tokenizer are read one after the other, and a vocabulary takes a while to read.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    facts = path.stat()
    return _opened(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, inode: int, size: int, changed: int) -> GgufFile:
    return GgufFile(path)


def raw_keys(path: Path) -> tuple[int, bytes]:
    """Number of a file's keys, and their bytes as they are; the file was opened before."""
    header = _Header(path)
    with open(path, "rb") as file:
        file.seek(_KEYS_BEGIN)
        return len(header.keys), file.read(header.keys_end - _KEYS_BEGIN)


class _UnknownTypeError(ValueError):
    """A tensor has a type that nobody here knows."""


class _Header:
    """The parsed beginning of a file; ValueError says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at, self.size = 0, len(self._file)
        if self._take(4) != b"GGUF":
            raise ValueError("its first bytes are not 'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format, or big-endian; 2 and 3 are read")
        tensors, keys = self._number("Q"), self._number("Q")
        self.keys: dict[str, Any] = {}
        for _ in range(self._count(keys, 12)):
            name = self._string()
            if name in self.keys:
                raise ValueError(f"key '{name}' stands twice")
            self.keys[name] = self._value(self._number("I"))
        self.keys_end = self._at
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}, not a power of two")
        self.alignment = alignment
        found = [self._tensor() for _ in range(self._count(tensors, 24))]
        self.data_offset = -(-self._at // alignment) * alignment
        self.tensors = [
            GgufTensor(name, kind, shape, self.data_offset + offset, self._file)
            for name, kind, shape, offset in found
        ]
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise ValueError("two tensors have the same name")

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"'{name}' has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        if min(shape) < 1 or math.prod(shape) > 1 << 62:
            raise ValueError(f"'{name}' has the shape {shape}")
        return name, self._number("I"), shape, self._number("Q")

    def _take(self, count: int) -> bytes:
        if count > self.size - self._at:
            raise ValueError(f"it ends at byte {self.size:,}, in the middle of its header")
        self._at += count
        return self._file[self._at - count : self._at]

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _count(self, count: int, least_bytes: int) -> int:
        """Return `count` if that many entries fit into the rest of the file."""
        if count * least_bytes > self.size - self._at:
            raise ValueError(f"it has {count:,} entries, which do not fit into the file")
        return count

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _BOOL:
            return bool(self._number("B"))
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MOST_NESTED:
            raise ValueError(f"a key has a value of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            width = struct.calcsize(f"<{_NUMBERS[inner]}")
            self._count(count, width)
            return np.frombuffer(self._take(count * width), f"<{_NUMBERS[inner]}").tolist()
        if inner == _STRING:
            return self._strings(self._count(count, 8))
        return [self._value(inner, depth + 1) for _ in range(self._count(count, 1))]

    def _strings(self, count: int) -> Strings:
        """`count` strings, of which only the lengths are read: a loop without calls."""
        view, at, length = self._file, self._at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length(view, at)[0]
        except (struct.error, OverflowError):  # behind the end
            at = self.size + 1
        if at > self.size:
            raise ValueError(f"it ends at byte {self.size:,}, in the middle of its header")
        begin, self._at = self._at, at
        return Strings(view, begin, at, count)


def _block(number: int) -> tuple[int, int]:
    """Weights and bytes of a block of llama.cpp's type `number`."""
    if number in _PLAIN:
        return 1, np.dtype(_PLAIN[number]).itemsize
    if number in _BLOCKS:
        return _BLOCKS[number]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    except (ValueError, KeyError):
        raise _UnknownTypeError(f"type {number}") from None
    return size, block_bytes


def _require_sound_places(header: _Header, path: Path) -> None:
    end, before = header.data_offset, "the header"
    for tensor in sorted(header.tensors, key=lambda tensor: (tensor.data_offset, tensor.n_bytes)):
        begin, wrong = tensor.data_offset, None
        if (begin - header.data_offset) % header.alignment:
            wrong = f"begins at byte {begin:,}, which is not aligned to {header.alignment}"
        elif begin < end:
            wrong = f"overlaps {before}"
        elif begin + tensor.n_bytes > header.size:
            wrong = f"ends at byte {begin + tensor.n_bytes:,}, but the file has {header.size:,}"
        if wrong:
            raise XinslmError(f"{path}: weight '{tensor.name}' {wrong}; {_AGAIN}")
        end, before = begin + tensor.n_bytes, f"'{tensor.name}'"
