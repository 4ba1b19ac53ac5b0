"""Calibration rows in files, so that a stopped run need not let the model write them again."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xinslm.data.packing import Batch
from xinslm.errors import XinslmError
from xinslm.files import new_file, read_json, sha256_file, sha256_json, write_json
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import open_tensors
from xinslm.quantize.calibration import CalibrationRows
from xinslm.quantize.finished_layers import ROWS

_ARRAYS = [field.name for field in fields(Batch)]


def save_rows(folder: Path, rows: CalibrationRows) -> None:
    """Write rows into the folder of a run; `ROWS`, which has its own hash and that of the
    arrays, comes last.
    """
    path = _arrays(folder)
    with new_file(path) as partial, SafetensorsWriter(partial, _ARRAYS) as file:
        for name in _ARRAYS:
            array = np.concatenate([getattr(batch, name) for batch in rows.batches])
            file.add(name, torch.from_numpy(array))
    content = asdict(rows) | {
        "batches": [len(batch.input_ids) for batch in rows.batches],
        "arrays": sha256_file(path),
    }
    write_json(folder / ROWS, {"rows": content, "sha256": sha256_json(content)})


def load_rows(folder: Path) -> CalibrationRows | None:
    """Rows that `save_rows` wrote; None if there are none, or if they are damaged."""
    try:
        stored = read_json(folder / ROWS)
        content: dict[str, Any] = stored["rows"]
        if sha256_json(content) != stored["sha256"]:
            return None
        if sha256_file(_arrays(folder)) != content.pop("arrays"):
            return None
        file, ends = open_tensors(_arrays(folder)), np.cumsum(content.pop("batches"))
        parts = [np.split(file.get_tensor(name).numpy(), ends[:-1]) for name in _ARRAYS]
        batches = [Batch(*arrays) for arrays in zip(*parts, strict=True)]
        return CalibrationRows(batches, **content)
    except (XinslmError, OSError, TypeError, KeyError, AttributeError):
        return None


def _arrays(folder: Path) -> Path:
    return folder / "rows.safetensors"
