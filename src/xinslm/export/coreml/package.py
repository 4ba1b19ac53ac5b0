"""A Core ML package as it lies on the disk: its operations, and the weights that they refer to.

Reads the program's protobuf and the file of weights by their definitions, not with the code that
wrote them. In weights/weight.bin each array has a record of 64 bytes, little-endian: the number
0xDEADBEEF, the type, the size in bytes, the offset of the data, padding. Codes of 4 bits lie two in
a byte, the first one in the low half.
"""

import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.errors import XinslmError

_SPEC = Path("Data", "com.apple.CoreML", "model.mlmodel")
_WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")
_RECORD = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
_TYPES = {
    "FLOAT16": "<f2",
    "FLOAT32": "<f4",
    "INT8": "<i1",
    "UINT8": "<u1",
    "INT32": "<i4",
    "BOOL": "?",
}
QUANTIZED = "constexpr_blockwise_shift_scale"
"""Operation of a weight made of codes and scales."""
PALETTIZED = "constexpr_lut_to_dense"
"""Operation of a weight made of indices and tables."""
_ENDINGS = ("", "_cast_fp16", "_to_fp16", "_palettized")
"""What is added to a weight's name when it becomes float16 or a palette."""


def program_names(name: str) -> list[str]:
    """Names that a weight can have in a program."""
    return [name.replace(".", "_") + end for end in _ENDINGS]


class Package:
    """A package that was opened; weights are read on demand."""

    def __init__(self, path: Path) -> None:
        from coremltools.proto import MIL_pb2, Model_pb2

        self.path = path
        self._type_name = MIL_pb2.DataType.Name
        self.spec = Model_pb2.Model()
        self.spec.ParseFromString((path / _SPEC).read_bytes())
        (block,) = self.spec.mlProgram.functions["main"].block_specializations.values()
        self.block = block
        self.operations: list[Any] = list(block.operations)
        self.census = Counter(op.type for op in self.operations)
        """Number of operations by type."""
        self._file = np.memmap(path / _WEIGHTS, np.uint8, "r")
        self._makers = {output.name: op for op in self.operations for output in op.outputs}

    def save_spec(self) -> None:
        """Write the description back after a change; the weights stay."""
        file = self.path / _SPEC
        file.write_bytes(self.spec.SerializeToString())
        file.chmod(0o644)

    def array(self, value: Any) -> np.ndarray:
        """A constant (a `Value` of the program) as an array; 4-bit codes as int8 or uint8."""
        tensor = value.type.tensorType
        kind = self._type_name(tensor.dataType)
        shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
        if value.WhichOneof("value") != "blobFileValue":
            return self._immediate(value.immediateValue.tensor, kind).reshape(shape)
        data = self._blob(value.blobFileValue.offset)
        if kind in ("INT4", "UINT4"):
            codes = np.stack((data & 15, data >> 4), axis=-1).reshape(-1)[: np.prod(shape)]
            signed = ((codes ^ 8).astype(np.int8) - 8) if kind == "INT4" else codes
            return signed.reshape(shape)
        return data.view(_TYPES[kind]).reshape(shape)

    def quantized(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Codes (rows, columns) and float16 scales (rows, columns / 32) of a weight; None unless it
        is one of `QUANTIZED` without an offset.
        """
        op = self._maker(name, QUANTIZED)
        if op is None or "offset" in op.inputs:
            return None
        codes, scales = (self.array(self._argument(op, key)) for key in ("data", "scale"))
        return codes, scales

    def palette(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Indices, uint8 (rows, columns), and float16 tables (groups, entries) of a weight; None
        unless it is one of `PALETTIZED` whose tables serve groups of rows.
        """
        op = self._maker(name, PALETTIZED)
        if op is None:
            return None
        indices, tables = (self.array(self._argument(op, key)) for key in ("indices", "lut"))
        entries = tables.shape[-2]
        if tables.size != tables.shape[0] * entries or tables.ndim != indices.ndim + 2:
            return None
        return indices.reshape(len(indices), -1), tables.reshape(-1, entries)

    def plain(self, name: str) -> np.ndarray | None:
        """A weight without codes; None if the program has no such constant."""
        op = self._maker(name, "const")
        return None if op is None else self.array(op.attributes["val"])

    def _maker(self, name: str, kind: str) -> Any:
        found = [self._makers[other] for other in program_names(name) if other in self._makers]
        return next((op for op in found if op.type == kind), None)

    @staticmethod
    def _argument(op: Any, key: str) -> Any:
        (argument,) = op.inputs[key].arguments
        return argument.value

    @staticmethod
    def _immediate(tensor: Any, kind: str) -> np.ndarray:
        held = tensor.WhichOneof("value")
        if held == "bytes":
            return np.frombuffer(tensor.bytes.values, _TYPES[kind])
        return np.array(getattr(tensor, held).values)

    def _blob(self, record: int) -> np.ndarray:
        if record + _RECORD.size > len(self._file):
            raise XinslmError(f"{self.path / _WEIGHTS} ends before byte {record:,}")
        sentinel, _, size, offset = _RECORD.unpack(
            self._file[record : record + _RECORD.size].tobytes()
        )
        if sentinel != _SENTINEL or offset + size > len(self._file):
            raise XinslmError(f"{self.path / _WEIGHTS} is damaged at byte {record:,}")
        blob: np.ndarray = self._file[offset : offset + size]
        return blob
