"""`xinslm export coreml`: a model as a Core ML program for macOS 15 and iOS 18.

The folder holds model.mlpackage, and next to it config.json, tokenizer and chat template. Codes and
scales of a quantized folder, or of another model that has them, become the program's constants;
what has none is written in float16. For the Neural Engine matrices become palettes (`fit.py`) in a
program of fixed shapes (`neural_engine.py`). Before the folder is put in place the package is
opened again, and each weight is compared with the model's or the palette's. The program cannot run
on Linux, so this has not run it. Memory: about 4 bytes a weight, with palettes 5.

    run(CoremlConfig(model=Path("student-4bit"), output_dir=Path("student-coreml")))
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xinslm.config import to_dict
from xinslm.errors import UsageError
from xinslm.export.card import Export, commands, write_card
from xinslm.export.config import NEURAL_ENGINE, CoremlConfig
from xinslm.export.coreml.compare import compare
from xinslm.export.coreml.convert import build, convert, require_coremltools
from xinslm.export.coreml.describe import describe
from xinslm.export.coreml.fit import fit_palettes
from xinslm.export.coreml.neural_engine import FixedTransformer
from xinslm.export.coreml.package import Package
from xinslm.export.coreml.palettes import Palette
from xinslm.export.coreml.program import StatefulTransformer
from xinslm.export.cost import ROW_TOKENS, Cost, divergence, held_out_rows, squared_error
from xinslm.export.kinds import EXPORT
from xinslm.export.packed_folder import VERSION, compare_tokenizers
from xinslm.export.packing import stored_weight
from xinslm.files import write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside
from xinslm.model.config import ModelConfig
from xinslm.model.files import open_model, require_context
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.model.stored import StoredWeight
from xinslm.precision import use_fast_float32
from xinslm.progress import Listener, Progress, ignore
from xinslm.quantize.calibration import CalibrationRows, RowShape, dataset_rows
from xinslm.runs import add_file, require_run
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer

PACKAGE = "model.mlpackage"
DEFAULT_LENGTH = 2048
_ALIGNMENT = 32
"""The Neural Engine fails on states whose last size is no multiple of it (apple/coremltools#2631);
the length is kept to it as well.
"""
_NOT_RUN = "Converted, and each weight read back and compared; not run on a Mac."


@dataclass(frozen=True)
class Result:
    """The folder that was written."""

    folder: Path
    types: dict[str, int]
    """Number of weights by how they are stored: '4-bit', '8-bit', '4-bit palette', '8-bit palette'
    or 'float16'.
    """
    weights: int
    rounded: int
    """Weights outside the codes that float16 does not hold exactly."""
    length: int
    """Tokens that the states hold."""
    state_bytes: int
    file_bytes: int
    """Size of the package."""
    operations: dict[str, int]
    """Operations of the program by type, constants left out."""
    cost: Cost | None = None
    """Of palettes."""
    notes: tuple[str, ...] = ()
    """What was done otherwise than asked, a sentence each."""

    def describe(self) -> str:
        """Lines for the terminal."""
        census = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        equal = f"all {self.weights:,} values equal the model's"
        if self.rounded or self.cost is not None:
            others = "all codes and scales" if len(self.types) > 1 else "all others"
            if self.cost is not None:
                others = "all indices and tables"
            equal = (
                f"{self.rounded:,} of {self.weights:,} values rounded to float16, {others} equal"
            )
        return "\n".join(
            [
                f"tensors {census}",
                f"program {sum(self.operations.values()):,} operations; {self.length:,} tokens, "
                f"whose keys and values take {self.state_bytes / 2**20:.1f} MiB",
                f"size    {self.file_bytes / 2**20:.2f} MiB",
                f"check   read back: {equal}",
                *(f"cost    {line}" for line in (self.cost.describe() if self.cost else ())),
                *(f"note    {note}" for note in self.notes),
                "reads   Core ML on macOS 15 or iOS 18; converted here, not run on a Mac",
                f"output  {self.folder}",
            ]
        )


def run(config: CoremlConfig, on_progress: Listener = ignore) -> Result:
    """Write a folder with the program and what is needed next to it."""
    config.check()
    use_fast_float32()
    _refuse_package_name(config.output_dir)
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (config.model,))
    if config.run is not None:
        require_run(config.run)
    require_coremltools()
    source = open_model(config.model)
    shape = source.config
    source.require()
    shapes = weight_shapes(shape)
    source.require_weights(shapes)
    length = _length(config, source)
    _refuse_neural_engine(config, source, shapes)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(shape.vocab_size, tokenizer, str(config.model))
    with new_folder(config.output_dir, config.force) as folder:
        palettized = Palettized()
        if config.compute_units == NEURAL_ENGINE:
            palettized = _palettize(config, source, shapes, tokenizer, on_progress)
        _write(config, source, shapes, palettized.palettes, length, folder / PACKAGE, on_progress)
        package = Package(folder / PACKAGE)
        types, rounded = compare(source, shapes, palettized.palettes, package, on_progress)
        describe(package, config.compute_units, source, length, types)
        source.save_config(folder, torch.float16)
        tokenizer.save(folder)
        compare_tokenizers(tokenizer, folder)
        size = _package_bytes(folder)
        _describe_folder(folder, config, source, types, length, size, palettized, tokenizer)
    result = Result(
        config.output_dir,
        types,
        sum(map(math.prod, shapes.values())),
        rounded,
        length,
        _state_bytes(shape, length),
        size,
        {kind: count for kind, count in package.census.items() if kind != "const"},
        palettized.cost,
        palettized.notes,
    )
    bits = 8 * result.file_bytes / result.weights
    add_file(config.run, config.output_dir, result.file_bytes, bits)
    return result


@dataclass(frozen=True)
class Palettized:
    """The palettes of a model; none unless it is for the Neural Engine."""

    palettes: dict[str, Palette] = field(default_factory=dict)
    cost: Cost | None = None
    rows: CalibrationRows | None = None
    """The rows that calibrated them."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong with the rows, a sentence each."""
        return () if self.rows is None else tuple(self.rows.notes)


def _palettize(
    config: CoremlConfig,
    source: ModelSource,
    shapes: dict[str, tuple[int, ...]],
    tokenizer: Any,
    on_progress: Listener,
) -> Palettized:
    rows, held_out = None, []
    if config.data_path is not None:
        length = min(source.config.max_position_embeddings, ROW_TOKENS)
        shape = RowShape(config.num_calibration_samples, length)
        rows = dataset_rows(config.data_path, tokenizer, source.config, shape, seed=0)
        held_out = held_out_rows(config.data_path, length)
    batches = [] if rows is None else rows.batches
    palettes = fit_palettes(source, shapes, config.group_size, batches, on_progress)
    found = None
    if held_out:
        stored = ((name, palette.decode()) for name, palette in palettes.items())
        found = divergence(source, stored, held_out, on_progress)
    cost = Cost(
        {n: squared_error(p.decode(), source.rows(n, shapes[n])) for n, p in palettes.items()},
        {name: f"palettes of {palette.bits} bits" for name, palette in palettes.items()},
        found,
        "" if config.data_path is None else config.data_path.resolve().name,
        _has_codes(source, shapes),
    )
    return Palettized(palettes, cost, rows)


def _describe_folder(
    folder: Path,
    config: CoremlConfig,
    source: ModelSource,
    types: dict[str, int],
    length: int,
    size: int,
    palettized: Palettized,
    tokenizer: Any,
) -> None:
    """Write model card and manifest."""
    has_chat = tokenizer.chat_template is not None
    runs = commands("coreml", config.compute_units, has_chat)
    cost, rows = palettized.cost, palettized.rows
    measured = [*cost.describe(), *palettized.notes, _NOT_RUN] if cost is not None else []
    export = Export(source, "coreml", PACKAGE, size, types, length, runs, config.run, measured)
    write_card(folder, export)
    inputs, calibration = {"model": source.fingerprint}, source.calibration
    if rows is not None and rows.dataset is not None:
        inputs["data"] = rows.dataset
        calibration = sorted({*calibration, *rows.texts})
    write_manifest(folder, EXPORT, VERSION, to_dict(config), inputs, calibration=calibration)


def _package_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / PACKAGE).rglob("*") if file.is_file())


def _refuse_package_name(path: Path) -> None:
    if path.suffix in (".mlpackage", ".mlmodelc", ".mlmodel"):
        raise UsageError(
            f"{path}: the output is a folder with {PACKAGE}, the tokenizer and the chat template: "
            f"choose a name without {path.suffix}"
        )


def _length(config: CoremlConfig, source: ModelSource) -> int:
    """Tokens that the states hold; UsageError if the model has fewer positions or a window, or the
    Neural Engine does not take the number.
    """
    wanted, model = config.max_seq_length, source.config
    window = model.sliding_window or model.max_position_embeddings
    is_fixed = config.compute_units == NEURAL_ENGINE
    if wanted is None:
        most = min(DEFAULT_LENGTH, window, model.max_position_embeddings)
        wanted = most - most % _ALIGNMENT if is_fixed else most
    require_context(wanted, model.max_position_embeddings, source.name)
    if wanted > window:
        raise UsageError(
            f"max_seq_length is {wanted}, but {source.name} has a sliding window of {window} "
            f"tokens, which the Core ML program has not; it is exact up to the window: pass "
            f"--max-seq-length {window}"
        )
    if is_fixed and (wanted % _ALIGNMENT or not wanted):
        raise UsageError(
            f"max_seq_length is {wanted}, but must be a multiple of {_ALIGNMENT} for the Neural "
            "Engine"
        )
    return wanted


def _refuse_neural_engine(
    config: CoremlConfig, source: ModelSource, shapes: dict[str, tuple[int, ...]]
) -> None:
    if config.compute_units == "all" and _has_codes(source, shapes):
        raise UsageError(
            "--compute-units all includes the Neural Engine, which gives wrong numbers without an "
            "error for weights with a scale per block (apple/coreai-models#279): use cpu-and-gpu, "
            f"or {NEURAL_ENGINE}, which palettizes; best from the model before `xinslm quantize`"
        )
    size = source.config.head_dim
    if config.compute_units == NEURAL_ENGINE and size % _ALIGNMENT:
        raise UsageError(
            f"{source.name} has heads of {size} numbers, but the Neural Engine fails on states "
            f"whose last size is no multiple of {_ALIGNMENT} (apple/coremltools#2631): use "
            "cpu-and-gpu"
        )


def _has_codes(source: ModelSource, shapes: dict[str, tuple[int, ...]]) -> bool:
    return any(
        stored is not None and stored.scales is not None
        for stored in (source.stored(name) for name, shape in shapes.items() if len(shape) > 1)
    )


def _write(
    config: CoremlConfig,
    source: ModelSource,
    shapes: dict[str, tuple[int, ...]],
    palettes: dict[str, Palette],
    length: int,
    path: Path,
    on_progress: Listener,
) -> None:
    def weights() -> Iterator[tuple[str, StoredWeight | Palette]]:
        for done, (name, shape) in enumerate(shapes.items()):
            on_progress(Progress("read", done, len(shapes), "tensors"))
            yield name, palettes.get(name) or stored_weight(source, name, shape)

    kind = FixedTransformer if config.compute_units == NEURAL_ENGINE else StatefulTransformer
    with torch.device("meta"):
        model = kind(source.config, length)
    build(model, weights())
    on_progress(Progress("convert", 0, 1, "programs"))
    convert(model, path, palettes)
    on_progress(Progress("convert", 1, 1, "programs"))


def _state_bytes(config: ModelConfig, length: int) -> int:
    """Bytes of both states in float16."""
    per_token = 2 * config.num_key_value_heads * config.head_dim * 2
    return config.num_hidden_layers * per_token * length
