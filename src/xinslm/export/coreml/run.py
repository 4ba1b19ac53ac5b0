"""`xinslm export coreml`: a model as a Core ML program for macOS 15 and iOS 18.

The folder holds model.mlpackage, and next to it config.json, tokenizer and chat template. Codes and
scales of a quantized folder, or of another model that has them, become the program's constants;
what has none is written in float16. Before the folder is put in place the package is opened again,
and each weight is compared with the model's. The program cannot run on Linux, so this has not run
it. Memory: about 4 bytes a weight.

    run(CoremlConfig(model=Path("student-4bit"), output_dir=Path("student-coreml")))
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xinslm.config import to_dict
from xinslm.errors import UsageError, XinslmError
from xinslm.export.card import Export, commands, write_card
from xinslm.export.config import CoremlConfig
from xinslm.export.coreml.convert import build, convert, require_coremltools
from xinslm.export.coreml.package import QUANTIZED, Package
from xinslm.export.coreml.program import INPUT_IDS, KEYS, MASK, VALUES
from xinslm.export.kinds import EXPORT
from xinslm.export.packed_folder import VERSION, compare_tokenizers
from xinslm.export.packing import BITS, codes, stored_weight
from xinslm.files import write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside
from xinslm.model.config import ModelConfig
from xinslm.model.files import open_model, require_context
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.model.stored import StoredWeight
from xinslm.progress import Listener, Progress, ignore
from xinslm.runs import add_file, require_run
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer

PACKAGE = "model.mlpackage"
DEFAULT_LENGTH = 2048
_UNITS = {"cpu-and-gpu": "cpuAndGPU", "cpu-only": "cpuOnly", "all": "all"}
"""Cases of Swift's `MLComputeUnits`."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Result:
    """The folder that was written."""

    folder: Path
    types: dict[str, int]
    """Number of weights by how they are stored: '4-bit', '8-bit' or 'float16'."""
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

    def describe(self) -> str:
        """Lines for the terminal."""
        census = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        equal = f"all {self.weights:,} values equal the model's"
        if self.rounded:
            others = "all codes and scales" if len(self.types) > 1 else "all others"
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
                "reads   Core ML on macOS 15 or iOS 18; converted here, not run",
                f"output  {self.folder}",
            ]
        )


def run(config: CoremlConfig, on_progress: Listener = ignore) -> Result:
    """Write a folder with the program and what is needed next to it."""
    config.check()
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
    length = _length(config.max_seq_length, source)
    _refuse_neural_engine(config, source, shapes)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(shape.vocab_size, tokenizer, str(config.model))
    with new_folder(config.output_dir, config.force) as folder:
        _write(source, shapes, length, folder / PACKAGE, on_progress)
        package = Package(folder / PACKAGE)
        types, rounded = _compare(source, shapes, package, on_progress)
        _describe(package, config, source, length, types)
        source.save_config(folder, torch.float16)
        tokenizer.save(folder)
        compare_tokenizers(tokenizer, folder)
        size = _package_bytes(folder)
        has_chat = tokenizer.chat_template is not None
        runs = commands("coreml", None, has_chat)
        export = Export(source, "coreml", PACKAGE, size, types, length, runs, config.run)
        write_card(folder, export)
        inputs, calibration = {"model": source.fingerprint}, source.calibration
        write_manifest(folder, EXPORT, VERSION, to_dict(config), inputs, calibration=calibration)
    result = Result(
        config.output_dir,
        types,
        sum(map(math.prod, shapes.values())),
        rounded,
        length,
        _state_bytes(shape, length),
        size,
        {kind: count for kind, count in package.census.items() if kind != "const"},
    )
    bits = 8 * result.file_bytes / result.weights
    add_file(config.run, config.output_dir, result.file_bytes, bits)
    return result


def _package_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / PACKAGE).rglob("*") if file.is_file())


def _refuse_package_name(path: Path) -> None:
    if path.suffix in (".mlpackage", ".mlmodelc", ".mlmodel"):
        raise UsageError(
            f"{path}: the output is a folder with {PACKAGE}, the tokenizer and the chat template: "
            f"choose a name without {path.suffix}"
        )


def _length(wanted: int | None, source: ModelSource) -> int:
    """Tokens that the states hold; UsageError if the model has fewer positions or a window."""
    config = source.config
    window = config.sliding_window or config.max_position_embeddings
    if wanted is None:
        return min(DEFAULT_LENGTH, window, config.max_position_embeddings)
    require_context(wanted, config.max_position_embeddings, source.name)
    if wanted > window:
        raise UsageError(
            f"max_seq_length is {wanted}, but {source.name} has a sliding window of {window} "
            f"tokens, which the Core ML program has not; it is exact up to the window: pass "
            f"--max-seq-length {window}"
        )
    return wanted


def _refuse_neural_engine(
    config: CoremlConfig, source: ModelSource, shapes: dict[str, tuple[int, ...]]
) -> None:
    if config.compute_units != "all":
        return
    if any(source.stored(name) is not None for name in shapes if len(shapes[name]) > 1):
        raise UsageError(
            "--compute-units all includes the Neural Engine, which gives wrong numbers without an "
            "error for weights with a scale per block (apple/coreai-models#279): use cpu-and-gpu, "
            "or export the model before `xinslm quantize`"
        )


def _write(
    source: ModelSource,
    shapes: dict[str, tuple[int, ...]],
    length: int,
    path: Path,
    on_progress: Listener,
) -> None:
    def weights() -> Iterator[tuple[str, StoredWeight]]:
        for done, (name, shape) in enumerate(shapes.items()):
            on_progress(Progress("read", done, len(shapes), "tensors"))
            yield name, stored_weight(source, name, shape)

    model = build(source.config, length, weights())
    on_progress(Progress("convert", 0, 1, "programs"))
    convert(model, path)
    on_progress(Progress("convert", 1, 1, "programs"))


def _compare(
    source: ModelSource, shapes: dict[str, tuple[int, ...]], package: Package, on_progress: Listener
) -> tuple[dict[str, int], int]:
    """Weights by how they are stored, and values that float16 rounded.

    XinslmError if a code, a scale or a rounded value is not the model's, or if there are others.
    """
    types: Counter[str] = Counter()
    rounded = 0
    for done, (name, shape) in enumerate(shapes.items()):
        on_progress(Progress("read back", done, len(shapes), "tensors"))
        weight = stored_weight(source, name, shape)
        if weight.format in BITS:
            assert weight.scales is not None, "a weight with codes has scales"
            _require_equal(f"{name}, codes", package.quantized(name), 0, codes(weight).numpy())
            _require_equal(f"{name}, scales", package.quantized(name), 1, weight.scales.numpy())
            types[f"{BITS[weight.format]}-bit"] += 1
            continue
        values = weight.dequantize()
        half = values.half()
        rounded += int((half.float() != values).sum())
        found = package.plain(name)
        if found is None and bool((half == 1).all()):
            found = half.numpy()  # coremltools leaves out a product with ones
        _require_equal(name, None if found is None else (found,), 0, half.numpy())
        types["float16"] += 1
    on_progress(Progress("read back", len(shapes), len(shapes), "tensors"))
    packed = sum(count for kind, count in types.items() if kind.endswith("-bit"))
    if package.census[QUANTIZED] != packed:
        raise XinslmError(
            f"the program has {package.census[QUANTIZED]} weights with codes, the model {packed}; "
            "nothing is written"
        )
    return dict(types), rounded


def _require_equal(
    what: str, found: tuple[np.ndarray, ...] | None, part: int, expected: np.ndarray
) -> None:
    if found is None:
        raise XinslmError(f"{what}: missing in the Core ML program; nothing is written")
    values = found[part]
    if values.shape != expected.shape or not np.array_equal(values, expected):
        same = values.shape == expected.shape
        count = f"{int((values != expected).sum()):,}" if same else "all"
        raise XinslmError(
            f"{what}: {count} values differ in the Core ML program; nothing is written"
        )


def _describe(
    package: Package, config: CoremlConfig, source: ModelSource, length: int, types: dict[str, int]
) -> None:
    """Put what a program that loads the package needs into its description."""
    description = package.spec.description
    texts = {
        INPUT_IDS: "Token ids, 1 x T: a prompt, or one token after those in the states.",
        MASK: "Added to the attention scores, 1 x 1 x T x S: 0 where a token sees another, else "
        "-65504. S counts all tokens, those in the states and the T new ones.",
    }
    for feature in description.input:
        feature.shortDescription = texts[feature.name]
    description.output[0].shortDescription = "Scores of the next token, 1 x T x vocabulary."
    units = _UNITS[config.compute_units]
    metadata = description.metadata
    metadata.shortDescription = (
        f"{source.settings.get('model_type')} language model; load it with computeUnits = .{units}"
    )
    settings = source.settings
    facts = {
        "context_length": length,
        "vocab_size": source.config.vocab_size,
        "states": f"{KEYS},{VALUES}",
        "compute_units": units,
        "weights": ", ".join(f"{count} {kind}" for kind, count in sorted(types.items())),
        "source": source.fingerprint,
        **{key: settings[key] for key in _TOKENS if settings.get(key) is not None},
    }
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        metadata.userDefined[f"xinslm.{key}"] = text
    package.save_spec()


def _state_bytes(config: ModelConfig, length: int) -> int:
    """Bytes of both states in float16."""
    per_token = 2 * config.num_key_value_heads * config.head_dim * 2
    return config.num_hidden_layers * per_token * length
