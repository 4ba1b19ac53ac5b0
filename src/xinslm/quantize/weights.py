"""Write quantized weights into a safetensors file, and note what they became.

with SafetensorsWriter(path, names) as file:
out = WeightWriter(file)
out.coded("lm_head", Q8_0, codes, scales)
out.facts.formats  # {"lm_head": "q8_0"}
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xinslm.model.finite import all_finite
from xinslm.model.grids import BLOCK, Grid, check_range
from xinslm.model.safetensors_writer import SafetensorsWriter


@dataclass
class Facts:
    """What is known of some written weights."""

    formats: dict[str, str] = field(default_factory=dict)
    """Format by weight name without '.weight'."""
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Method and layer losses of each calibrated linear."""
    noted: dict[str, list[str]] = field(default_factory=dict)
    """Deviations from the request: names of the weights by reason."""

    def note(self, name: str, reason: str) -> None:
        """Note a deviation once."""
        names = self.noted.setdefault(reason, [])
        if name not in names:
            names.append(name)

    def merge(self, later: "Facts") -> None:
        """Add what is known of weights that were written later."""
        self.formats |= later.formats
        self.losses |= later.losses
        for reason, names in later.noted.items():
            for name in names:
                self.note(name, reason)

    @property
    def notes(self) -> list[str]:
        """One sentence per reason with the weights it concerns."""
        return [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
            for reason, names in self.noted.items()
        ]


class WeightWriter:
    """Writes weights in the formats of a quantized folder."""

    def __init__(self, file: SafetensorsWriter) -> None:
        self._file, self.facts = file, Facts()
        self.tensors: list[str] = []
        """Names of the tensors in the order in which they were written."""

    def coded(self, name: str, grid: Grid, codes: Tensor, scales: Tensor) -> None:
        """Write codes as they are stored, and scales; `name` is without '.weight'."""
        self.facts.formats[name] = grid.name
        self._add(f"{name}.codes", codes)
        self._add(f"{name}.scales", scales.half())

    def plain(self, name: str, weight: Tensor) -> None:
        """Write a weight in float32."""
        self.facts.formats[name.removesuffix(".weight")] = "f32"
        self._add(name, weight)

    def half(self, name: str, weight: Tensor) -> Tensor:
        """Write a weight in float16, or in float32 if float16 loses precision; return the stored
        values.
        """
        half = weight.half()
        lost = (half.float() - weight).double().square().sum()
        if not all_finite(half) or lost > 1e-6 * weight.double().square().sum():
            self.plain(name, weight)
            return weight
        self.facts.formats[name.removesuffix(".weight")] = "f16"
        self._add(name, half)
        return half.float()

    def fits(self, name: str, weight: Tensor, grid: Grid) -> bool:
        """Whether a matrix fits this grid; if not, a note says why."""
        if weight.shape[1] % BLOCK:
            self.facts.note(
                name, f"rows of {weight.shape[1]} are no multiple of {BLOCK}, kept at 16 bits"
            )
            return False
        report = check_range(weight, grid)
        if not report.fits:
            self.facts.note(name, "magnitudes that float16 scales cannot hold, kept unquantized")
        elif report.small_blocks:
            self.facts.note(name, "some blocks are too small for a fine float16 scale")
        return report.fits

    def _add(self, name: str, tensor: Tensor) -> None:
        self.tensors.append(name)
        self._file.add(name, tensor)
