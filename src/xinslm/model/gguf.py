"""A GGUF file as a model: the very weights that llama.cpp multiplies with, by Hugging Face's names.

The `gguf` package, llama.cpp's own, dequantizes. Query and key rows go back from llama.cpp's order
(neighbouring pairs) to Hugging Face's. What differs from llama.cpp's results is its rounding of
activations to 8 bits, which `int8_inputs.py` does on request.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_file
from xinslm.gguf_file import GgufFile, Strings
from xinslm.model.config import ModelConfig
from xinslm.model.finite import all_finite
from xinslm.model.gguf_families import FAMILIES, Family, read_settings
from xinslm.model.grids import GRIDS, Q4_0
from xinslm.model.source import ModelSource
from xinslm.model.stored import StoredWeight
from xinslm.model.transformer import rotary_frequencies

_ROPE_FACTORS = "rope_freqs.weight"
CALIBRATION = "xinslm.calibration"
"""Key with the ids of the texts that calibrated the model's quantization, an array of strings."""


class GgufSource(ModelSource):
    """A GGUF file of one of `FAMILIES`."""

    kind = "gguf"

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, path)
        self.where = str(path)
        self.files = [path]
        self._file = GgufFile(path)
        if "xinslm.layout" in self._file.keys:
            raise UsageError(
                f"{path} is packed for the native engine, which alone reads it; give the model "
                "that it was made from"
            )
        self._settings = read_settings(self._file)
        self._architecture: str = self._file.keys["general.architecture"]
        self._family: Family = FAMILIES[self._architecture]

    def _hash_files(self) -> str:
        return sha256_file(self.path)

    @property
    def calibration(self) -> list[str]:
        """Ids of the texts that calibrated the model's quantization, if an export wrote them."""
        found = self._file.keys.get(CALIBRATION)
        return [str(id) for id in found] if isinstance(found, Strings) else []

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """The content that config.json would have."""
        rescaled = _ROPE_FACTORS in self._file.tensors
        return self._rescaled(self._settings) if rescaled else self._settings

    def _rescaled(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with LLaMA-3's rescaling, from the divisors of its frequencies."""
        plain = ModelConfig.from_hf(settings, self.where)
        factors = torch.from_numpy(self._values(self._file.tensors[_ROPE_FACTORS]))
        frequencies = rotary_frequencies(plain)
        if factors.shape == frequencies.shape and bool((factors >= 1).all()):
            for scaling in _llama3_scalings(frequencies.double(), factors.double()):
                config = replace(plain, rope_scaling=scaling)
                found = frequencies / rotary_frequencies(config)
                if torch.allclose(found, factors, rtol=1e-4, atol=0):
                    return config.to_hf()
        raise UsageError(
            f"{self.path}: its rope_freqs.weight is not LLaMA-3's rescaling of frequencies; give "
            "the model's Hugging Face folder"
        )

    @cached_property
    def _places(self) -> dict[str, Any]:
        """Gguf's tensors by Hugging Face's names."""
        places = {}
        for name, tensor in self._file.tensors.items():
            if name == _ROPE_FACTORS:
                continue
            theirs = self._family.hf_name(name)
            if theirs is None:
                raise XinslmError(
                    f"{self.path}: weight '{name}' has no place in a {self._architecture} model"
                )
            places[theirs] = tensor
        return places

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        """Hugging Face's names of the weights."""
        return list(self._places)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one dequantized weight."""
        return tuple(int(size) for size in reversed(self._places[name].shape))

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Dequantize one weight, or its rows [start, stop), to float32."""
        place = self._places[name]
        if self._family.is_permuted and ("q_proj" in name or "k_proj" in name):
            values = self._values(place)
            values = self._family.from_rotation(values, name, self.config.head_dim)[start:stop]
        else:
            values = self._values(place, start, stop)
        if self._family.norm_offset and "norm" in name:
            values = values - np.float32(self._family.norm_offset)
        return torch.from_numpy(np.ascontiguousarray(values))

    def stored(self, name: str) -> StoredWeight | None:
        """A weight of type Q4_0 or Q8_0: its blocks."""
        place = self._places[name]
        grid = GRIDS.get(place.tensor_type.name.lower())
        if grid is None:
            return None
        blocks = np.array(place.data).reshape(len(place.data), -1, grid.block_bytes)
        if self._family.is_permuted:
            blocks = self._family.from_rotation(blocks, name, self.config.head_dim)
        scales = torch.from_numpy(blocks[..., :2].copy().view(np.float16)[..., 0])
        data = torch.from_numpy(np.ascontiguousarray(blocks[..., 2:])).flatten(1)
        data = data if grid is Q4_0 else data.view(torch.int8)
        if not all_finite(scales):
            raise XinslmError(f"{self.path}: weight '{name}' holds NaN or infinity")
        return StoredWeight(grid.name, self.shape_of(name), data.contiguous(), scales.contiguous())

    def _values(self, tensor: Any, start: int = 0, stop: int | None = None) -> np.ndarray:
        from gguf import quants

        try:
            values = quants.dequantize(tensor.data[start:stop], tensor.tensor_type)
        except NotImplementedError:
            raise UsageError(
                f"{self.path}: weight '{tensor.name}' is of type {tensor.tensor_type.name}, which "
                "the gguf package cannot dequantize; give another quantization of the model"
            ) from None
        # a copy: the map ends with this object, and a damaged file must not change weights later
        return np.array(values, dtype=np.float32)


def _llama3_scalings(frequencies: Tensor, factors: Tensor) -> list[dict[str, Any]]:
    """Return the rescalings that may have these divisors: the usual one, and the one that solves
    the linear rule between the two thresholds (`rotary_frequencies`), for which 1/divisor is
    linear in the frequency.
    """
    factor = round(float(factors.max()), 3)

    def scaling(low: float, high: float, context: float) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }

    found = [scaling(1.0, 4.0, 8192)]
    between = (factors > 1) & (factors < factors.max() * (1 - 1e-6))
    if int(between.sum()) >= 2 and factor > 1:
        blend = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        turns = frequencies[between] / (2 * torch.pi)
        slope = (blend[0] - blend[-1]) / (turns[0] - turns[-1])
        offset = slope * turns[0] - blend[0]  # blend = slope * turns - offset
        high = 1 + 1 / float(offset)  # low_freq_factor 1 fixes the scale of the other two
        context = float(slope) * (high - 1)
        found.append(scaling(1.0, round(high, 3), round(context)))
    return found
