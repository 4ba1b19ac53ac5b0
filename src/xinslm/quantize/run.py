"""`xinslm quantize`: a model folder in, the canonical quantized folder out (see `pipeline` for
how).

run(QuantizeConfig(model=Path("model"), output_dir=Path("model-4bit"), data_path=Path("dataset")))
run(QuantizeConfig(model=Path("model"), output_dir=Path("model-4bit"), self_generate=True))
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xinslm import __version__
from xinslm.config import to_dict
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import Batch
from xinslm.errors import UsageError, XinslmError
from xinslm.files import MANIFEST, read_json, write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside
from xinslm.model.config import ModelConfig
from xinslm.model.files import open_model
from xinslm.model.grids import GRIDS
from xinslm.model.names import QUANTIZED_WEIGHTS, parameter_name
from xinslm.model.quantized import KIND, VERSION
from xinslm.model.source import TRAINED_FOR_Q4_0, ModelSource
from xinslm.progress import Listener, ignore
from xinslm.quantize.activations import working_bytes
from xinslm.quantize.calibration import CalibrationRows, RowShape, dataset_rows
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.finished_layers import (
    FinishedLayers,
    explained_full_disk,
    stopped_run,
)
from xinslm.quantize.keep import Kept
from xinslm.quantize.kept_rows import load_rows, save_rows
from xinslm.quantize.pipeline import Quantization
from xinslm.quantize.refine import refine, require_room
from xinslm.quantize.self_generated import write_rows
from xinslm.runs import add_file, require_run
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer


@dataclass(frozen=True)
class Result:
    """Result of a quantization."""

    folder: Path
    formats: dict[str, tuple[int, int]]
    """For each format: number of tensors, number of weights."""
    bits_per_weight: float
    """Of all weights, including scales and unquantized tensors."""
    file_bytes: int
    source_bytes: int
    refinements: tuple[str, ...]
    """What followed the codes, a line each."""
    loss_ratio: float | None
    """Layer loss of GPTQ relative to rounding to nearest, geometric mean over the linears."""
    notes: tuple[str, ...]

    def describe(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{kind:<7}{tensors:>5} tensors {weights:>15,} weights"
            for kind, (tensors, weights) in sorted(self.formats.items())
        ]
        smaller = self.source_bytes / self.file_bytes
        lines.append(
            f"size   {self.file_bytes / 2**20:.2f} MiB, {self.bits_per_weight:.3f} bits a weight; "
            f"source {self.source_bytes / 2**20:.2f} MiB, {smaller:.1f} times as large"
        )
        if self.loss_ratio is not None:
            lines.append(
                f"loss   {self.loss_ratio:.3f} of what rounding to nearest adds to a layer's error "
                "(geometric mean)"
            )
        lines += self.refinements
        lines += [f"note   {note}" for note in self.notes]
        return "\n".join([*lines, f"output {self.folder}"])


def run(config: QuantizeConfig, on_progress: Listener = ignore) -> Result:
    """Quantize a model folder into the canonical folder.

    If GPTQ chooses the codes, a run that was stopped continues after the last finished layer, with
    the same bytes in the end. XinslmError if the disk is full.
    """
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (config.model, config.data_path))
    if config.run is not None:
        require_run(config.run)
    source = open_model(config.model)
    if config.method is None and config.bits == 4:
        is_trained = TRAINED_FOR_Q4_0.items() <= source.settings.items()
        config = replace(config, method="absmax" if is_trained else "gptaq")
    config.check()
    # for rounding alone, too: no later stage has a use for a folder without one
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(source.config.vocab_size, tokenizer, str(source.path))
    with _progress(config, source, tokenizer, on_progress) as finished:
        work, lines = _make(config, source, tokenizer, finished, on_progress)
    result = _result(work, config.output_dir, lines)
    name = f"quantized {result.folder.name}"
    add_file(config.run, result.folder, result.file_bytes, result.bits_per_weight, name)
    return result


@contextmanager
def _progress(
    config: QuantizeConfig, source: ModelSource, tokenizer: Any, on_progress: Listener
) -> Iterator[FinishedLayers | None]:
    """The finished layers of a run that GPTQ calibrates; None if codes are only rounded."""
    if not config.feeds_back_errors:
        with explained_full_disk(config.output_dir):
            yield None
        return
    settings = ("bits", "method", "num_calibration_samples", "max_seq_length", "seed")
    plan = {
        "program": f"xinslm {__version__} with torch {torch.__version__}",
        "model": source.fingerprint,
        "tokenizer": tokenizer.fingerprint(),
        "dataset": None if config.data_path is None else open_dataset(config.data_path).fingerprint,
        **{name: getattr(config, name) for name in settings},
    }
    with stopped_run(config.output_dir, plan, on_progress) as finished:
        yield finished


def _make(
    config: QuantizeConfig,
    source: ModelSource,
    tokenizer: Any,
    finished: FinishedLayers | None,
    on_progress: Listener,
) -> tuple[Quantization | Kept, list[str]]:
    """Make the folder; return what was done, and lines on what followed the codes."""
    inputs = {"model": source.fingerprint}
    calibration = None
    if config.calibrates:
        calibration = _calibration_rows(config, source, tokenizer, finished, on_progress)
        if calibration.dataset is not None:
            inputs["dataset"] = calibration.dataset
    batches = [] if calibration is None else calibration.batches
    method = str(config.method or "rtn")
    require_room(config, source, batches)
    work: Quantization | Kept = Kept(source, on_progress)
    if config.method != "keep":
        rows = batches if finished is not None else []
        if finished is not None:
            _require_disk(finished.folder, source.config, rows, method == "gptaq")
        work = Quantization(source, config.bits, rows, on_progress, method, finished)
    with new_folder(config.output_dir, config.force) as folder:
        write_folder(work, tokenizer, folder, to_dict(config), inputs, method, calibration)
        lines = refine(config, source, folder, batches, on_progress)
    return work, lines


def _require_disk(folder: Path, model: ModelConfig, rows: list[Batch], with_original: bool) -> None:
    """Raise XinslmError if the activations and the codes, twice, do not fit on the disk."""
    needed = working_bytes(model, rows, with_original) + 2 * model.num_parameters * 5 // 8
    found = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if needed > found + free:
        raise XinslmError(
            f"quantizing needs {needed / 1e6:,.0f} MB on the disk of {folder.parent} for the time "
            f"being, but {(found + free) / 1e6:,.0f} MB are free: free some, choose another "
            "--output-dir, or take fewer --num-calibration-samples"
        )


def write_folder(
    work: Quantization | Kept,
    tokenizer: Any,
    folder: Path,
    config: dict[str, Any],
    inputs: dict[str, str],
    method: str,
    calibration: CalibrationRows | None = None,
) -> None:
    """Quantize into an empty `folder`: weights, config and tokenizer, manifest.

    The manifest has the ids of the texts that calibrated the weights, now or before, which
    evaluations refuse.
    """
    work.write(folder)
    work.source.save_config(folder)
    tokenizer.save(folder)
    texts, notes = set(work.source.calibration), list(work.notes)
    content: dict[str, Any] = {}
    if calibration is not None:
        texts |= set(calibration.texts)
        notes = calibration.notes + notes
        content["calibration_rows"] = calibration.facts
    content |= {
        "method": method,
        "formats": work.formats,
        "layers": work.losses,
        "notes": notes,
        "calibration": sorted(texts),
    }
    write_manifest(folder, KIND, VERSION, config, inputs, bits=work.bits, **content)


def _calibration_rows(
    config: QuantizeConfig,
    source: ModelSource,
    tokenizer: Any,
    finished: FinishedLayers | None,
    on_progress: Listener,
) -> CalibrationRows:
    """Rows of the dataset, or rows that the model writes, or has written for a stopped run."""
    model = source.config
    length = config.max_seq_length or min(model.max_position_embeddings, 512)
    if length > model.max_position_embeddings:
        raise UsageError(
            f"--max-seq-length is {length}, but the model reads at most "
            f"{model.max_position_embeddings}"
        )
    shape = RowShape(config.num_calibration_samples, length)
    if config.self_generate:
        rows = None if finished is None else load_rows(finished.folder)
        if rows is None:
            rows = write_rows(source, tokenizer, shape, config.seed, on_progress)
            if finished is not None:
                save_rows(finished.folder, rows)
        return rows
    assert config.data_path is not None, "QuantizeConfig.check sees to it"
    return dataset_rows(config.data_path, tokenizer, model, shape, config.seed)


def _result(work: Quantization | Kept, folder: Path, lines: list[str]) -> Result:
    manifest = read_json(folder / MANIFEST)
    formats: dict[str, str] = manifest["formats"]
    bits = {"f16": 16.0, "f32": 32.0} | {grid.name: grid.bits_per_weight for grid in GRIDS.values()}
    tensors, weights = Counter(formats.values()), Counter[str]()
    for name, kind in formats.items():
        weights[kind] += math.prod(work.shapes[parameter_name(name)])
    ratios = [
        loss["loss"] / loss["rtn_loss"]
        for loss in manifest["layers"].values()
        if loss["loss"] and loss["rtn_loss"]
    ]
    return Result(
        folder,
        {kind: (tensors[kind], weights[kind]) for kind in tensors},
        sum(bits[kind] * count for kind, count in weights.items()) / sum(weights.values()),
        (folder / QUANTIZED_WEIGHTS).stat().st_size,
        work.source.weight_bytes,
        tuple(lines),
        math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
        tuple(manifest["notes"]),
    )
