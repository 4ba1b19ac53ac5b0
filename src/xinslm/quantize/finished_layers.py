"""Layers that a quantization has finished, in a folder that outlives the process.

A layer is a safetensors file with its codes, and a JSON file that is written last: what is known of
the weights, hashes of the codes, of the layer before, of the calibration rows and of the
activations after. A layer whose files do not have these hashes counts as not finished, and is
computed again alone if the others follow from the same bytes. `stopped.py` has the folder's life.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.files import new_file, read_json, sha256_file, write_json
from xinslm.model.grids import GRIDS, Q4_0, decode, unpack_nibbles
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import open_tensors
from xinslm.quantize.weights import Facts, WeightWriter

ROWS = "rows.json"
"""Calibration rows that the model has written (`kept_rows.py`)."""
_SCRATCH = ("inputs", "*-next", "*-states-0", ".*.partial-*")
"""Files that a continued run does not read."""


@dataclass(frozen=True)
class Layer:
    """A finished layer."""

    facts: Facts
    tensors: list[str]
    """Names of the tensors in the order of the quantized file."""
    sha256: str
    """Hash of its safetensors file."""
    previous: str
    """Hash of the file of the layer before; empty for the first."""
    rows: str
    """Hash of the calibration rows (`hash_rows`); empty without calibration."""
    states: dict[str, str]
    """Hash of the activations after it, by stream; empty without calibration."""


@dataclass(frozen=True)
class Found:
    """What a stopped run has left."""

    layers: dict[int, Layer]
    """Finished layers by index. Each follows from the present rows, and from the layer before if
    that is among them.
    """
    damaged: list[int]
    """Layers that were finished, but whose files are damaged or missing."""
    foreign: list[int]
    """Layers whose files are sound, but follow from other rows or from another layer before."""

    def describe(self, count: int) -> str:
        """How many of `count` layers are taken over, and what is not; empty if nothing was left."""
        if not (self.layers or self.damaged or self.foreign):
            return ""
        are = "is" if len(self.layers) == 1 else "are"
        note = f"continuing: {len(self.layers)} of {count} layers {are} taken over"
        if self.damaged:
            note += f"; the files of {_named(self.damaged)} are damaged, computing again"
        if self.foreign:
            follow = "follows" if len(self.foreign) == 1 else "follow"
            note += (
                f"; {_named(self.foreign)} {follow} from other calibration text or another layer "
                "before, computing again"
            )
        return note


class FinishedLayers:
    """The files of finished layers in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, index: int, end: str) -> Path:
        return self.folder / f"layer-{index}.{end}"

    @contextmanager
    def write(self, index: int, names: list[str]) -> Iterator[WeightWriter]:
        """Give a writer for a layer's weights, by `names` at most; `finish` completes the layer."""
        path = self._path(index, "safetensors")
        with new_file(path) as partial, SafetensorsWriter(partial, names) as file:
            yield WeightWriter(file)

    def finish(
        self, index: int, out: WeightWriter, previous: str, rows: str, states: dict[str, str]
    ) -> Layer:
        """Mark a written layer as finished; `previous`, `rows` and `states` as in `Layer`."""
        sha256 = sha256_file(self._path(index, "safetensors"))
        layer = Layer(out.facts, out.tensors, sha256, previous, rows, states)
        write_json(self._path(index, "json"), asdict(layer))
        return layer

    def find(self, count: int, rows: str) -> Found:
        """Look for `count` layers that follow from the calibration rows with hash `rows`; each
        file's hash is computed once.
        """
        found = Found({}, [], [])
        for index in range(count):
            if not self._path(index, "json").is_file():
                continue
            layer, before = self._read(index), found.layers.get(index - 1)
            if layer is None:
                found.damaged.append(index)
            elif layer.rows != rows or (before is not None and layer.previous != before.sha256):
                found.foreign.append(index)
            else:
                found.layers[index] = layer
        return found

    def _read(self, index: int) -> Layer | None:
        """A finished layer; None if it is damaged."""
        try:
            content = read_json(self._path(index, "json"))
            layer = Layer(**(content | {"facts": Facts(**content["facts"])}))
            is_sound = sha256_file(self._path(index, "safetensors")) == layer.sha256
        except (XinslmError, OSError, TypeError, KeyError):
            return None
        return layer if is_sound else None

    def remove_scratch(self) -> None:
        """Delete the files that a continued run does not read, also those of killed runs."""
        for pattern in _SCRATCH:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def remains(self) -> str:
        """What is worth keeping, with its verb: "3 finished layers are"; empty if nothing is."""
        count = sum(1 for _ in self.folder.glob("layer-*.json"))
        if count:
            return "1 finished layer is" if count == 1 else f"{count} finished layers are"
        has_rows = (self.folder / ROWS).is_file()
        return "the calibration text that the model wrote is" if has_rows else ""

    def tensors(self, index: int, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a finished layer in order."""
        file = open_tensors(self._path(index, "safetensors"))
        for name in layer.tensors:
            yield name, file.get_tensor(name)

    def weights(self, index: int, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        """Yield name without '.weight' and float32 values of each weight of a finished layer."""
        tensors = dict(self.tensors(index, layer))
        for name, kind in layer.facts.formats.items():
            if kind in GRIDS:
                codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
                yield name, decode(unpack_nibbles(codes) if kind == Q4_0.name else codes, scales)
            elif f"{name}.weight" in tensors:
                yield name, tensors[f"{name}.weight"].float()


def _named(layers: list[int]) -> str:
    """Layers in words: 'layer 1', 'layers 0, 1 and 2'."""
    *others, last = map(str, layers)
    return f"layers {', '.join(others)} and {last}" if others else f"layer {last}"
