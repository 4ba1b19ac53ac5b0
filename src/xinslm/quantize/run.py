"""`xinslm quantize`: a model folder in, the canonical quantized folder out (see `pipeline` for
how).

run(QuantizeConfig(model=Path("model"), output_dir=Path("model-4bit"), data_path=Path("dataset")))
run(QuantizeConfig(model=Path("model"), output_dir=Path("model-4bit"), self_generate=True))
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xinslm.config import to_dict
from xinslm.files import MANIFEST, read_json, write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside
from xinslm.model.files import open_model
from xinslm.model.grids import GRIDS
from xinslm.model.names import QUANTIZED_WEIGHTS, parameter_name
from xinslm.model.quantized import KIND, VERSION
from xinslm.model.source import TRAINED_FOR_Q4_0, ModelSource
from xinslm.precision import use_fast_float32
from xinslm.progress import Listener, Progress, ignore
from xinslm.quantize.calibration import CalibrationRows, RowShape, dataset_rows
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.finished_layers import ROWS, FinishedLayers
from xinslm.quantize.keep import Kept
from xinslm.quantize.kept_rows import load_rows, save_rows
from xinslm.quantize.pipeline import Quantization
from xinslm.quantize.plan import make_plan, require_disk, row_shape
from xinslm.quantize.refine import refine, require_room
from xinslm.quantize.self_generated import write_rows
from xinslm.quantize.stopped import stopped_run, unstoppable_run
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

    If GPTQ chooses the codes, a run that was stopped continues after the last finished layer; with
    the same number of threads it ends with the same bytes. XinslmError if the disk is full.
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
    use_fast_float32()
    # for rounding alone, too: no later stage has a use for a folder without one
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(source.config.vocab_size, tokenizer, str(source.path))
    shape = row_shape(config, source.config) if config.calibrates else None
    with _progress(config, source, tokenizer, shape, on_progress) as finished:
        rows = None
        if shape is not None:
            rows = _calibration_rows(config, source, tokenizer, shape, finished, on_progress)
        work, lines = _make(config, source, tokenizer, rows, finished, on_progress)
    result = _result(work, config.output_dir, lines)
    name = f"quantized {result.folder.name}"
    add_file(config.run, result.folder, result.file_bytes, result.bits_per_weight, name)
    return result


@contextmanager
def _progress(
    config: QuantizeConfig,
    source: ModelSource,
    tokenizer: Any,
    shape: RowShape | None,
    on_progress: Listener,
) -> Iterator[FinishedLayers | None]:
    """The finished layers of a run that GPTQ calibrates; None if codes are only rounded or kept.
    The output is locked meanwhile.
    """
    if not config.feeds_back_errors:
        plan = {"bits": config.bits, "method": config.method or "rtn"}
        with unstoppable_run(config.output_dir, plan, config.force):
            yield None
        return
    assert shape is not None, "GPTQ calibrates"
    plan = make_plan(config, source, tokenizer, shape)
    with stopped_run(config.output_dir, plan, config.force, on_progress) as finished:
        yield finished


def _make(
    config: QuantizeConfig,
    source: ModelSource,
    tokenizer: Any,
    calibration: CalibrationRows | None,
    finished: FinishedLayers | None,
    on_progress: Listener,
) -> tuple[Quantization | Kept, list[str]]:
    """Make the folder; return what was done, and lines on what followed the codes."""
    inputs = {"model": source.fingerprint}
    if calibration is not None and calibration.dataset is not None:
        inputs["dataset"] = calibration.dataset
    batches = [] if calibration is None else calibration.batches
    method = str(config.method or "rtn")
    require_room(config, source, batches)
    work: Quantization | Kept = Kept(source, on_progress)
    if config.method != "keep":
        rows = batches if finished is not None else []
        work = Quantization(source, config.bits, rows, on_progress, method, finished)
        if finished is not None:
            require_disk(finished.folder, work)
    with new_folder(config.output_dir, config.force) as folder:
        write_folder(work, tokenizer, folder, to_dict(config), inputs, method, calibration)
        lines = refine(config, source, folder, batches, on_progress)
        source.require_unchanged()
    return work, lines


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
    shape: RowShape,
    finished: FinishedLayers | None,
    on_progress: Listener,
) -> CalibrationRows:
    """Rows of the dataset, or rows that the model writes, or has written for a stopped run."""
    if config.self_generate:
        rows = None
        if finished is not None and (finished.folder / ROWS).exists():
            rows = load_rows(finished.folder)
            if rows is None:
                note = "the calibration text that the model wrote is damaged, writing it again"
                on_progress(Progress("quantize", note=note))
        if rows is None:
            rows = write_rows(source, tokenizer, shape, config.seed, on_progress)
            source.require_unchanged()
            if finished is not None:
                save_rows(finished.folder, rows)
        return rows
    assert config.data_path is not None, "QuantizeConfig.check sees to it"
    return dataset_rows(config.data_path, tokenizer, source.config, shape, config.seed)


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
