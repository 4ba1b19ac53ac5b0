"""Reads a GGUF file back and compares every value with what was to be written."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import quants
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.export import tables
from xinslm.export.gguf_tensors import Entry, reordered
from xinslm.gguf_file import GgufFile, GgufTensor
from xinslm.model.config import ModelConfig
from xinslm.model.source import ModelSource
from xinslm.progress import Listener, Progress

_ALL = slice(None)
_PIECE = 1 << 21
"""Values that are compared at once."""


@dataclass(frozen=True)
class Check:
    """What reading a file back found."""

    rounded: int
    """Values that the types of the file do not hold exactly."""
    notes: tuple[str, ...]


def compare(source: ModelSource, entries: list[Entry], path: Path, on_progress: Listener) -> Check:
    """Read the file back; XinslmError if a value is not the model's, rounded to its type."""
    written = GgufFile(path).tensors
    rounded, notes = 0, []
    for done, entry in enumerate(entries):
        on_progress(Progress("read back", done, len(entries), "tensors"))
        if not entry.weight:
            continue
        tensor = written[entry.name]
        if _is_equal(source, entry.weight, tensor):
            continue
        found = _values(tensor)
        values = source.rows(entry.weight, source.shape_of(entry.weight))
        _require_written(entry, found, values, source.config)
        original = reordered(values.numpy(), entry.weight, source.config)
        changed = int((found != original).sum())
        rounded += changed
        if changed and entry.kind.name.lower() in tables.BLOCKS:
            error = tables.relative_error(found, original)
            notes.append(
                f"{entry.weight}: rounded to {entry.kind.name}, relative error {error:.2%}"
            )
    on_progress(Progress("read back", len(entries), len(entries), "tensors"))
    return Check(rounded, tuple(notes))


def _is_equal(source: ModelSource, name: str, tensor: GgufTensor) -> bool:
    """Whether a tensor holds a weight's very values, some rows at a time: memory that is used again
    costs no page faults.
    """
    shape = source.shape_of(name)
    if len(shape) < 2:
        return np.array_equal(_values(tensor), source.rows(name, shape).numpy())
    heads = source.config.head_dim  # rows change places within a head
    step = max(1, _PIECE // (heads * shape[1])) * heads
    for at in range(0, shape[0], step):
        rows = source.rows(name, shape, at, min(at + step, shape[0])).numpy()
        found = _values(tensor, slice(at, at + step))
        if not np.array_equal(found, reordered(rows, name, source.config)):
            return False
    return True


def _values(tensor: GgufTensor, rows: slice = _ALL) -> np.ndarray:
    """Float32 values of rows of a tensor."""
    values: np.ndarray = quants.dequantize(tensor.data[rows], tensor.tensor_type)
    return values.astype(np.float32, copy=False)


def _require_written(entry: Entry, found: np.ndarray, values: Tensor, model: ModelConfig) -> None:
    """Raise XinslmError if values that were read back are not the model's, rounded to the type."""
    if entry.hashes == [tables.hash_values(found)]:
        return  # codes that are searched for need no second search
    expected = reordered(entry.rounding(values).numpy(), entry.weight, model)
    if not np.array_equal(found, expected):
        count = int((found != expected).sum()) if found.shape == expected.shape else "all"
        raise XinslmError(
            f"{entry.weight}: {count} values differ after the export; nothing is written"
        )
