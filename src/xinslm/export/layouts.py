"""How transformers' compressed-tensors and GPTQ, and mlx-lm, store quantized weights: tensors,
entries of config.json, and how a stored weight is read again.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from xinslm.errors import UsageError
from xinslm.export.packing import BITS, by_input, words
from xinslm.model import words as layouts
from xinslm.model.finite import all_finite
from xinslm.model.grids import BLOCK
from xinslm.model.stored import StoredWeight

EMBEDDING = "model.embed_tokens"


class Layout(Protocol):
    """One format; a weight's stem is its name without '.weight'."""

    runtimes: str
    """What reads it."""

    def packs(self, stem: str, kind: str) -> bool:
        """Whether codes of a weight of format `kind` are kept; else it is stored dequantized."""

    def tensors(self, stem: str, weight: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a packed weight by name, scales in `dtype`."""

    def settings(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """Entries of config.json for matrices of these formats, by stem."""

    def decode(self, read: layouts.Read, stem: str, bits: int) -> Tensor:
        """A packed weight in float32."""


class CompressedTensors:
    """`pack-quantized` of the library compressed-tensors: linear layers of 4 and 8 bits."""

    runtimes = "transformers with compressed-tensors, vLLM"

    def packs(self, stem: str, kind: str) -> bool:
        """Linear layers; an embedding is a table there."""
        return kind in BITS and stem != EMBEDDING

    def tensors(self, stem: str, weight: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Words along each row, scales, and the shape."""
        return {
            f"{stem}.weight_packed": words(weight),
            f"{stem}.weight_scale": _scales(weight, dtype),
            f"{stem}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def settings(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """A group for each number of bits; the most frequent one is that of all linear layers."""
        stems: dict[int, list[str]] = {}
        for stem, kind in kinds.items():
            if self.packs(stem, kind):
                stems.setdefault(BITS[kind], []).append(stem)
        order = sorted(stems, key=lambda bits: len(stems[bits]))  # a narrow target comes first
        plain = [s for s, k in kinds.items() if k not in BITS and s != EMBEDDING]
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if bits == order[-1] else stems[bits],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": BLOCK,
                    "dynamic": False,
                    "observer": "minmax",
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, bits in enumerate(order)
        }
        head = [] if "lm_head" in kinds else ["lm_head"]
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "kv_cache_scheme": None,
                "ignore": plain + head,
                "config_groups": groups,
            }
        }

    def decode(self, read: layouts.Read, stem: str, bits: int) -> Tensor:
        """By the format's definition."""
        return layouts.compressed_tensors(read, stem, bits)


class Gptq:
    """GPTQ's checkpoint, version 1: 4-bit layers of the blocks; runs in 4 bits on a processor."""

    runtimes = "transformers with gptqmodel, vLLM"

    def packs(self, stem: str, kind: str) -> bool:
        """4-bit layers of the blocks; the format has one number of bits."""
        return kind == "q4_0" and stem.startswith("model.layers.")

    def tensors(self, stem: str, weight: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Words along the input; zero points are 8, stored less 1; scales in float16."""
        rows, columns = weight.shape
        if rows % 8:
            raise UsageError(
                f"{stem} has {rows:,} rows, but GPTQ's zero points need a multiple of 8: use "
                "--format compressed-tensors"
            )
        scales = weight.scales
        assert scales is not None, "a weight with codes has scales"
        return {
            f"{stem}.qweight": by_input(weight),
            f"{stem}.qzeros": torch.full((columns // BLOCK, rows // 8), 0x77777777).int(),
            f"{stem}.scales": scales.T.contiguous(),
            f"{stem}.g_idx": torch.arange(columns, dtype=torch.int32) // BLOCK,
        }

    def settings(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """`quantization_config` of gptqmodel."""
        plain = [s for s in kinds if s.startswith("model.layers.") and not self.packs(s, kinds[s])]
        if plain:
            raise UsageError(
                f"{plain[0]} is not in 4 bits, and GPTQ's checkpoints have one number of bits for "
                "all layers: use --format compressed-tensors"
            )
        return {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": BLOCK,
                "desc_act": False,
                "sym": True,
                "lm_head": False,
                "checkpoint_format": "gptq",
            }
        }

    def decode(self, read: layouts.Read, stem: str, bits: int) -> Tensor:
        """By the format's definition."""
        return layouts.gptq(read, stem, bits)


class Mlx:
    """MLX's affine quantization: all matrices, the embedding too."""

    runtimes = "mlx-lm"

    def packs(self, stem: str, kind: str) -> bool:
        """All quantized weights."""
        return kind in BITS

    def tensors(self, stem: str, weight: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Words along each row; codes are unsigned, so the bias is that of code 0."""
        scales = _scales(weight, dtype)
        biases = -scales * (1 << (BITS[weight.format] - 1))
        if not all_finite(biases):
            raise UsageError(f"{stem}: a scale is too large for float16: use --dtype float32")
        return {
            f"{stem}.weight": words(weight).view(torch.uint32),
            f"{stem}.scales": scales,
            f"{stem}.biases": biases,
        }

    def settings(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """The most frequent number of bits, and the layers with another one."""
        found = [BITS[kind] for kind in kinds.values() if kind in BITS]
        usual = max(set(found), key=found.count)
        other = {
            stem: {"group_size": BLOCK, "bits": BITS[kind]}
            for stem, kind in kinds.items()
            if kind in BITS and BITS[kind] != usual
        }
        return {"quantization": {"group_size": BLOCK, "bits": usual, **other}}

    def decode(self, read: layouts.Read, stem: str, bits: int) -> Tensor:
        """By the format's definition."""
        return layouts.mlx(read, stem, bits)


def _scales(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Scales in `dtype`; all of them hold at most 8 significant bits, so none is rounded."""
    assert weight.scales is not None, "a weight with codes has scales"
    return weight.scales.to(dtype)
