"""Write safetensors one tensor at a time, so that memory holds one tensor only.

The library's own writer needs all tensors at once. This one reserves space for the header, writes
each tensor as it comes, and writes the header at the end; the format allows spaces after the JSON.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


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
        data = tensor.contiguous().view(torch.uint8).numpy()  # numpy has no bfloat16
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
