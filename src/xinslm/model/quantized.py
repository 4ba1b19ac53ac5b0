"""The folder of `xinslm quantize`: int4 or int8 codes and one fp16 scale per 32 weights, in
`quantized.safetensors`, a name that no other program takes for a model's weights.

Each runtime's format is transcribed from this one without rounding again. For a weight
`NAME.weight` of (rows, columns) the file holds `NAME.codes` (uint8 (rows, columns / 2) in Q4_0's
nibble order, or int8 (rows, columns)) and `NAME.scales` (float16 (rows, columns / 32)). Norms,
biases, and weights whose rows are not a multiple of 32, are stored unquantized.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.files import MANIFEST, read_json, read_manifest
from xinslm.model.finite import all_finite
from xinslm.model.grids import BLOCK, GRIDS, Q4_0
from xinslm.model.names import (
    CONFIG,
    QUANTIZED_BY,
    QUANTIZED_KIND,
    QUANTIZED_VERSION,
    QUANTIZED_WEIGHTS,
    parameter_name,
)
from xinslm.model.source import (
    FolderSource,
    ModelSource,
    open_tensors,
    weight_shapes,
)
from xinslm.model.stored import StoredWeight

KIND, VERSION, _MADE_BY = QUANTIZED_KIND, QUANTIZED_VERSION, QUANTIZED_BY
_PLAIN = {"f16": torch.float16, "f32": torch.float32}


class QuantizedSource(FolderSource):
    """A quantized folder; weights are read on demand, dequantized by `tensor`."""

    kind = "quantized"

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, path)
        self.manifest: dict[str, Any] = read_manifest(self.path, KIND, VERSION, _MADE_BY)
        formats = self.manifest.get("formats")
        if not isinstance(formats, dict) or self.manifest.get("bits") not in (4, 8):
            raise XinslmError(
                f"{self.path / MANIFEST}: 'formats' or 'bits' is missing or "
                f"damaged; run `{_MADE_BY}`"
            )
        self.formats: dict[str, str] = {parameter_name(s): kind for s, kind in formats.items()}
        """Format of every weight, by its Hugging Face parameter name."""
        self._path = self.path / QUANTIZED_WEIGHTS
        self._file = open_tensors(self._path)
        self.require()
        self._shapes = weight_shapes(self.config)
        if self.formats.keys() != self._shapes.keys():
            odd = sorted(self.formats.keys() ^ self._shapes.keys())
            raise XinslmError(
                f"{self.path}: weight '{odd[0]}' is in only one of config.json and {MANIFEST}"
            )

    @property
    def files(self) -> list[Path]:  # type: ignore[override]
        """config.json and the codes and scales."""
        return [self.path / CONFIG, self.path / QUANTIZED_WEIGHTS]

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        """Hugging Face's names of the weights."""
        return list(self.formats)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one dequantized weight."""
        return self._shapes[name]

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Dequantize one weight, or its rows [start, stop), to float32."""
        return self.stored(name).dequantize(start, stop)

    def pretrained_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `from_pretrained` of transformers' class loads this."""
        return ModelSource.pretrained_arguments(self)

    def stored(self, name: str) -> StoredWeight:
        """Read one weight as it is stored; XinslmError if it is damaged."""
        kind, shape, stem = self.formats[name], self._shapes[name], name.removesuffix(".weight")
        if not isinstance(kind, str):
            raise XinslmError(
                f"{self.path / MANIFEST}: the format of '{stem}' is {kind!r}, which is no name"
            )
        if kind in _PLAIN:
            return StoredWeight(kind, shape, self._tensor(name, _PLAIN[kind], shape), None)
        if kind not in GRIDS:
            raise XinslmError(f"{self.path / MANIFEST}: '{stem}' has the unknown format '{kind}'")
        scales = self._tensor(f"{stem}.scales", torch.float16, (shape[0], shape[1] // BLOCK))
        if not all_finite(scales):
            raise XinslmError(
                f"{self._path}: '{stem}.scales' holds NaN or infinity; quantize again"
            )
        if kind == Q4_0.name:
            codes = self._tensor(f"{stem}.codes", torch.uint8, (shape[0], shape[1] // 2))
        else:
            codes = self._tensor(f"{stem}.codes", torch.int8, shape)
        return StoredWeight(kind, shape, codes, scales)

    def _tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if name not in self._file.keys():  # noqa: SIM118 - not a dict
            raise XinslmError(f"{self._path} has no '{name}'; quantize again with `{_MADE_BY}`")
        tensor: Tensor = self._file.get_tensor(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise XinslmError(
                f"{self._path}: '{name}' is {tensor.dtype} {tuple(tensor.shape)}, "
                f"but must be {dtype} {shape}; quantize again with `{_MADE_BY}`"
            )
        return tensor


def is_quantized(folder: Path) -> bool:
    """Whether a folder's manifest says that it holds a quantized model."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path) if path.is_file() else None
    return isinstance(manifest, dict) and manifest.get("kind") == KIND
