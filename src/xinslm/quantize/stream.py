"""Read and write safetensors one tensor at a time, so that memory holds one tensor only.

The library's own writer needs all tensors at once. This one reserves space for the header, writes
each tensor as it comes, and writes the header at the end; the format allows spaces after the JSON.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.model.config import ModelConfig
from xinslm.model.files import open_tensors, require_weights, weight_files

_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


class WeightReader:
    """The weights of a model folder by name, read from memory maps as float32 on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.bytes = sum(file.stat().st_size for file in weight_files(self.folder))
        """Total size of the weight files."""
        self._handles: dict[str, Any] = {}
        for file in weight_files(self.folder):
            handle = open_tensors(file)
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def require(self, config: ModelConfig) -> None:
        """Raise XinslmError if these weights cannot make a model of this shape."""
        require_weights(config, len(self._handles), self.bytes, f"{self.folder}/config.json")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a weight as float32; XinslmError if it is missing, misshapen or not finite."""
        return self.read_rows(name, shape, 0, shape[0])

    def read_rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a weight of `shape` as float32."""
        if name not in self._handles:
            raise XinslmError(f"{self.folder}: weight '{name}' is missing")
        part = self._handles[name].get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise XinslmError(
                f"{self.folder}: weight '{name}' has shape {tuple(part.get_shape())}, config.json "
                f"asks for {shape}"
            )
        rows = part[start:stop].float()
        if not torch.isfinite(rows).all():
            raise XinslmError(
                f"{self.folder}: weight '{name}' holds NaN or infinity; the model is broken"
            )
        return rows


class SafetensorsWriter:
    """Write a safetensors file: `with SafetensorsWriter(path, names) as out: out.add(...)`.

    `room_for` lists names, at least as many and as long as will be added; it sizes the header.
    """

    def __init__(self, path: Path, room_for: list[str]) -> None:
        self.path = path
        self._header_bytes = -(-sum(len(name.encode()) + 120 for name in room_for) // 8) * 8 + 64
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._position = 0
        self._late: list[tuple[str, Tensor]] = []

    def __enter__(self) -> "SafetensorsWriter":
        self._file = open(self.path, "wb")
        self._file.write(b" " * (8 + self._header_bytes))
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; sizes that are no multiple of 8 bytes come last, for alignment."""
        if tensor.numel() * tensor.element_size() % 8:
            self._late.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.contiguous().numpy()
        end = self._position + data.nbytes
        facts = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._header[name] = facts | {"data_offsets": [self._position, end]}
        self._file.write(data.data)
        self._position = end

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                for name, tensor in sorted(self._late, key=lambda item: -item[1].element_size()):
                    self._write(name, tensor)
                header = json.dumps(self._header, separators=(",", ":")).encode()
                assert len(header) <= self._header_bytes, "more or longer names than `room_for`"
                self._file.seek(0)
                self._file.write(self._header_bytes.to_bytes(8, "little"))
                self._file.write(header.ljust(self._header_bytes))
        finally:
            self._file.close()
