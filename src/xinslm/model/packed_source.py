"""Folders with weights quantized by other programs, or by `xinslm export`: compressed-tensors,
GPTQ and MLX; dequantized when read.

The layouts are those of `words.py`. Read are codes of 2, 4 and 8 bits with any group size, and
GPTQ's order of columns; refused by name are zero points in compressed-tensors and codes of 3, 5 or
6 bits.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.files import read_json
from xinslm.model import words
from xinslm.model.grids import BLOCK, Q4_0, Q8_0
from xinslm.model.source import CONFIG, FolderSource, ModelSource
from xinslm.model.stored import StoredWeight

_PACKED = {
    "compressed-tensors": ".weight_packed",
    "gptq": ".qweight",
    "mlx": ".scales",
}
"""The ending of a tensor that each packed weight has, by format."""
_PARTS = {
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_shape", ".weight_g_idx"),
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "mlx": (".weight", ".scales", ".biases"),
}
_KEYS = ("quantization_config", "quantization")


def packed_format(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The format of a folder's packed weights, and what config.json says of it; None if it names
    none of those known.
    """
    path = folder / CONFIG
    settings = read_json(path) if path.is_file() else None
    if not isinstance(settings, dict):
        return None
    quantization = settings.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
        # other formats of compressed-tensors, such as fp8, are left to transformers
        is_packed = quantization.get("format", "pack-quantized") == "pack-quantized"
        if method == "gptq" or (method == "compressed-tensors" and is_packed):
            return str(method), quantization
    own = settings.get("quantization")
    return ("mlx", own) if isinstance(own, dict) and {"bits", "group_size"} <= own.keys() else None


class PackedSource(FolderSource):
    """A folder in one of the formats; weights are read on demand, dequantized by `tensor`."""

    kind = "quantized"

    def __init__(self, name: str, path: Path, layout: str, quantization: dict[str, Any]) -> None:
        super().__init__(name, path)
        self.layout, self.quantization = layout, quantization

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """The content of config.json without what it says of the quantization."""
        found: dict[str, Any] = super().settings
        return {key: value for key, value in found.items() if key not in _KEYS}

    @cached_property
    def stems(self) -> list[str]:
        """Names of the packed weights without '.weight'."""
        end = _PACKED[self.layout]
        found = [name.removesuffix(end) for name in self._handles if name.endswith(end)]
        odd = next((name for name in self._handles if name.endswith(".weight_zero_point")), None)
        if odd is not None:
            raise XinslmError(
                f"{self.path}: '{odd}': compressed-tensors with zero points is not supported; "
                "symmetric quantization is"
            )
        return found

    @cached_property
    def names(self) -> list[str]:  # type: ignore[override]
        """Hugging Face's names of the weights."""
        parts = {stem + end for stem in self.stems for end in _PARTS[self.layout]}
        plain = [name for name in self._handles if name not in parts]
        return [f"{stem}.weight" for stem in self.stems] + plain

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one dequantized weight."""
        stem = name.removesuffix(".weight")
        if stem not in self.stems:
            return super().shape_of(name)
        if self.layout == "compressed-tensors":
            rows, columns = self._read(f"{stem}.weight_shape").tolist()
            return int(rows), int(columns)
        if self.layout == "gptq":
            height, rows = self._stored_shape(f"{stem}.qweight")
            return rows, height * 32 // self.bits(stem)
        rows, groups = self._stored_shape(f"{stem}.scales")
        return rows, groups * int(self._settings_of(stem)["group_size"])

    def bits(self, stem: str) -> int:
        """Bits of a code; XinslmError if codes do not fill words evenly."""
        if self.layout == "gptq":
            found = self.quantization.get("bits")
        else:
            packed = f"{stem}.weight_packed" if self.layout != "mlx" else f"{stem}.weight"
            width, columns = self._stored_shape(packed)[1], self.shape_of(f"{stem}.weight")[1]
            found = 32 * width // columns if columns else 0
        if found not in (2, 4, 8):
            raise XinslmError(
                f"{self.path}: '{stem}' has codes of {found} bits; 2, 4 and 8 are supported"
            )
        return int(found)

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Dequantize one weight to float32, or its rows [start, stop); plain ones as stored."""
        stem = name.removesuffix(".weight")
        if stem not in self.stems:
            return super().tensor(name, start, stop)
        try:
            found = self._decode(stem)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise XinslmError(
                f"{self.path}: the parts of '{stem}' do not fit together ({error}); copy the "
                "folder again"
            ) from None
        return found[start:stop]

    def _decode(self, stem: str) -> Tensor:
        bits = self.bits(stem)
        if self.layout == "gptq":
            version = 2 if self.quantization.get("checkpoint_format") == "gptq_v2" else 1
            return words.gptq(self._read, stem, bits, version)
        if self.layout == "mlx":
            return words.mlx(self._read, stem, bits)
        return words.compressed_tensors(self._read, stem, bits, self._is_ordered(stem))

    def _is_ordered(self, stem: str) -> bool:
        """Whether groups of compressed-tensors are neighbours; -1 stands for an unused order."""
        name = f"{stem}.weight_g_idx"
        return name not in self._handles or bool((self._read(name) < 0).all())

    def stored(self, name: str) -> StoredWeight | None:
        """A weight of 4 or 8 bits in symmetric groups of 32 neighbours; None for any other."""
        stem = name.removesuffix(".weight")
        if stem not in self.stems or (bits := self.bits(stem)) not in (4, 8):
            return None
        rows, columns = self.shape_of(name)
        scales = self._scales(stem, 1 << (bits - 1))
        if columns % BLOCK or scales is None or tuple(scales.shape) != (rows, columns // BLOCK):
            return None
        values = self.tensor(name).unflatten(1, (-1, BLOCK))
        codes = (values.double() / scales.double()[..., None]).round().flatten(1)
        grid = Q4_0 if bits == 4 else Q8_0
        found = StoredWeight.of(codes, scales, grid)
        same = found is not None and torch.equal(found.dequantize(), values.flatten(1))
        return found if same else None

    def _scales(self, stem: str, middle: int) -> Tensor | None:
        """Scales (rows, groups) of symmetric codes whose value 0 is `middle`; else None."""
        if self.layout == "compressed-tensors":
            return self._read(f"{stem}.weight_scale").float() if self._is_ordered(stem) else None
        scales = self._read(f"{stem}.scales").float()
        if self.layout == "mlx":
            biases = self._read(f"{stem}.biases").float()
            return scales if torch.equal(biases, -middle * scales) else None
        order = self._read(f"{stem}.g_idx").long()
        is_ordered = torch.equal(order, torch.arange(len(order)) // BLOCK)
        return scales.T.contiguous() if is_ordered else None

    def pretrained_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `from_pretrained` of transformers' class loads this."""
        return ModelSource.pretrained_arguments(self)

    def _settings_of(self, stem: str) -> dict[str, Any]:
        own = self.quantization.get(stem)
        return own if isinstance(own, dict) else self.quantization

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._handles:
            raise XinslmError(f"{self.path} has no '{name}'; copy the complete folder")
        return tuple(self._handles[name].get_slice(name).get_shape())

    def _read(self, name: str) -> Tensor:
        self._stored_shape(name)
        try:
            tensor: Tensor = self._handles[name].get_tensor(name)
        except SafetensorError as error:
            raise XinslmError(f"{self.path}: '{name}' cannot be read ({error})") from None
        return tensor if tensor.dtype != torch.uint32 else tensor.view(torch.int32)
