"""Take over the codes of a model that has them: a GGUF file of types Q4_0 and Q8_0, a folder of
compressed-tensors, GPTQ or MLX with symmetric groups of 32, a quantized folder.

No weight is rounded: what has no codes on these grids is stored in float16 if that is exact, else
in float32.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from xinslm.errors import UsageError
from xinslm.model.grids import Q4_0
from xinslm.model.names import QUANTIZED_WEIGHTS
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.progress import Listener, Progress, ignore


class Kept:
    """One run, with the interface of `Quantization` that the folder's writer needs."""

    def __init__(self, source: ModelSource, on_progress: Listener = ignore) -> None:
        self.model, self.source, self.on_progress = source.config, source, on_progress
        source.require()
        self.shapes = weight_shapes(self.model)
        source.require_weights(self.shapes)
        self.formats: dict[str, str] = {}
        self.losses: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    @property
    def bits(self) -> int:
        """4 if most linear layers have 4-bit codes, else 8."""
        counts = Counter(self.formats.values())
        return 4 if counts[Q4_0.name] > counts["q8_0"] else 8

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Write all weights into the folder's safetensors file; UsageError if none has codes."""
        stems = [name.removesuffix("weight") for name in self.shapes]
        names = [stem + end for stem in stems for end in ("codes", "scales")]
        plain: list[str] = []
        with SafetensorsWriter(folder / QUANTIZED_WEIGHTS, names) as out:
            for done, name in enumerate(self.shapes):
                self.on_progress(Progress("quantize", done, len(self.shapes), "tensors"))
                stem, weight = name.removesuffix(".weight"), self.source.stored(name)
                if weight is not None and weight.scales is not None:
                    self.formats[stem] = weight.format
                    out.add(f"{stem}.codes", weight.data)
                    out.add(f"{stem}.scales", weight.scales)
                    continue
                values = self.source.rows(name, self.shapes[name])
                is_half = values.dim() > 1 and torch.equal(values.half().float(), values)
                self.formats[stem] = "f16" if is_half else "f32"
                out.add(name, values.half() if is_half else values)
                if values.dim() > 1:
                    plain.append(stem)
        if not set(self.formats.values()) & {"q4_0", "q8_0"}:
            raise UsageError(
                f"{self.source.name} has no weights of Q4_0, Q8_0 or symmetric groups of 32 to "
                "keep; choose --method gptq or rtn"
            )
        if plain:
            more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
            self.notes.append(f"{plain[0]}{more}: no codes on these grids, stored unquantized")
        count = len(self.shapes)
        self.on_progress(Progress("quantize", count, count, "tensors"))
