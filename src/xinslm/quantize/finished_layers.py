"""Layers that a quantization has finished, in a folder that outlives the process.

A layer is a safetensors file with its codes, and a JSON file that is written last: what is known of
the weights, hashes of the codes, of the layer before and of the activations after. A layer whose
files do not have these hashes counts as not finished, and is computed again alone if the others
follow from the same bytes.

`stopped_run` gives the folder of one quantization, `.NAME.unfinished` next to the output folder
NAME. It has no config.json, so no command takes it for a model.
"""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from xinslm.errors import Interrupted, XinslmError
from xinslm.files import new_file, read_json, sha256_file, write_json
from xinslm.folders import differing_keys, locked
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import open_tensors
from xinslm.progress import Listener, Progress
from xinslm.quantize.weights import Facts, WeightWriter

ROWS = "rows.json"
"""Calibration rows that the model has written (`kept_rows.py`)."""
_PLAN = "plan.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}


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
    states: dict[str, str]
    """Hash of the activations after it, by stream; empty without calibration."""


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

    def finish(self, index: int, out: WeightWriter, previous: str, states: dict[str, str]) -> Layer:
        """Mark a written layer as finished."""
        sha256 = sha256_file(self._path(index, "safetensors"))
        layer = Layer(out.facts, out.tensors, sha256, previous, states)
        write_json(self._path(index, "json"), asdict(layer))
        return layer

    def read(self, index: int) -> Layer | None:
        """A finished layer; None if it is missing or damaged."""
        try:
            content = read_json(self._path(index, "json"))
            layer = Layer(**(content | {"facts": Facts(**content["facts"])}))
            is_sound = sha256_file(self._path(index, "safetensors")) == layer.sha256
        except (XinslmError, OSError, TypeError, KeyError):
            return None
        return layer if is_sound else None

    def are_worth_keeping(self) -> bool:
        """Delete what a continued run does not read, and return whether anything is left."""
        for scratch in (self.folder / "inputs", *self.folder.glob("*-next")):
            scratch.unlink(missing_ok=True)
        return any(self.folder.glob("layer-*.json")) or (self.folder / ROWS).is_file()

    def has(self, index: int) -> bool:
        """Whether a layer was finished once."""
        return self._path(index, "json").is_file()

    def tensors(self, index: int, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a finished layer in order."""
        file = open_tensors(self._path(index, "safetensors"))
        for name in layer.tensors:
            yield name, file.get_tensor(name)


@contextmanager
def stopped_run(
    output: Path, plan: Mapping[str, Any], on_progress: Listener
) -> Iterator[FinishedLayers]:
    """Begin the folder of a quantization into `output`, or continue that of a stopped one.

    `plan` is all that the codes follow from: with another one the folder is begun anew, and a note
    says what differs. The folder is deleted at the end, also if the request turns out impossible;
    it stays after a kill, Ctrl-C (Interrupted) and a full disk (XinslmError).
    """
    output = Path(output).resolve()
    folder = output.parent / f".{output.name}.unfinished"
    with locked(output):
        if folder.is_dir() and (reason := _difference(folder, plan)):
            shutil.rmtree(folder)
            note = f"starting over, because {reason}"
            on_progress(Progress("quantize", note=note))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _PLAN, plan)
        layers, is_kept = FinishedLayers(folder), False
        try:
            with explained_full_disk(output):
                yield layers
        except KeyboardInterrupt:
            is_kept = True
            raise Interrupted(f"stopped; {_remains(layers)}") from None
        except DiskFullError as error:
            is_kept = True
            raise XinslmError(f"{error}; {_remains(layers)}") from None
        except XinslmError:
            raise
        except BaseException:
            is_kept = True
            raise
        finally:
            if not (is_kept and layers.are_worth_keeping()):
                shutil.rmtree(folder, ignore_errors=True)


def _remains(layers: FinishedLayers) -> str:
    """What a stopped run has left, and how to go on."""
    count = sum(1 for _ in layers.folder.glob("layer-*.json"))
    if not count:
        return "no layer was finished"
    return (
        f"{count} finished layers are in {layers.folder}, and the same command continues after "
        "them (delete the folder if you do not want that)"
    )


def _difference(folder: Path, plan: Mapping[str, Any]) -> str:
    """Why the stopped run in `folder` cannot be continued with this plan; empty if it can."""
    try:
        found = read_json(folder / _PLAN)
    except XinslmError:
        found = None
    if not isinstance(found, dict):
        return "the plan of the stopped run is damaged"
    changed = [key.replace("_", " ") for key in differing_keys(plan, found)]
    return f"{', '.join(changed)} changed since the run that was stopped" if changed else ""


class DiskFullError(XinslmError):
    """No space is left where the output is written."""


@contextmanager
def explained_full_disk(output: Path) -> Iterator[None]:
    """Raise DiskFullError, which names the folder, instead of an OSError that does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"no space is left on the disk of {output}, so it was not written: free some, or "
            "choose another --output-dir"
        ) from None
