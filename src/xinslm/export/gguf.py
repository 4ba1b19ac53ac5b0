"""`xinslm export gguf`: one file for llama.cpp and programs built on it.

The codes and scales of a quantized folder, and of any other model that has codes on these grids
(`ModelSource.stored`), become llama.cpp's Q4_0 and Q8_0 blocks bit for bit, without rounding again.
The query and key rows of LLaMA and Mistral are reordered, because llama.cpp rotates neighbouring
pairs there and Hugging Face rotates (i, i + D/2); blocks run along columns, so this works on packed
bytes. The file is read back by llama.cpp's own package before it is put in place. Memory holds one
tensor at a time.

    run(GgufConfig(model=Path("model-4bit"), output_path=Path("model.gguf")))
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.export import companions, tables
from xinslm.export.config import GgufConfig
from xinslm.export.vocabulary import read_vocabulary
from xinslm.files import new_file
from xinslm.gguf_file import GgufFile
from xinslm.model.config import ModelConfig
from xinslm.model.files import open_model
from xinslm.model.gguf import CALIBRATION
from xinslm.model.gguf_families import FAMILIES
from xinslm.model.grids import BLOCK, GRIDS
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.model.transformer import rotary_frequencies
from xinslm.progress import Listener, Progress, ignore
from xinslm.runs import add_file, require_run

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    weight: str
    """Its Hugging Face name; empty for what no weight of the model is."""
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows and columns as written: blocks counted in bytes (uint8), or values."""
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    rounding: Callable[[Tensor], Tensor] = lambda values: values
    """From the model's values to those that the type holds."""
    hashes: list[str] = field(default_factory=list)
    """Hash of the values that were written in blocks, after `load`."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Result:
    """Result of an export."""

    path: Path
    file_bytes: int
    types: dict[str, int]
    """Number of tensors by ggml type."""
    bits_per_weight: float
    context_length: int
    weights: int
    rounded: int
    """Values that the types of the file do not hold exactly; none has codes."""
    notes: tuple[str, ...]
    written: tuple[Path, ...] = ()
    """What was written with it: the Modelfile, LM Studio's link."""

    def describe(self) -> str:
        """A few lines for the terminal."""
        census = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        equal = f"all {self.weights:,} values equal the model's"
        if self.rounded:
            equal = f"{self.rounded:,} of {self.weights:,} values rounded, all others equal"
        return "\n".join(
            [
                f"tensors {census}",
                f"size    {self.file_bytes / 2**20:.2f} MiB, {self.bits_per_weight:.3f} bits a "
                "weight",
                f"context {self.context_length:,} tokens",
                f"check   read back: {equal}",
                *(f"note    {note}" for note in self.notes),
                *(f"output  {path}" for path in (self.path, *self.written)),
            ]
        )


def run(config: GgufConfig, on_progress: Listener = ignore) -> Result:
    """Write a GGUF file of any model; without `outtype`, what has codes keeps them bit for bit."""
    config.check()
    if config.output_path.is_dir():
        raise UsageError(
            f"--output-path {config.output_path} is a folder; name a file, such as model.gguf in it"
        )
    if config.output_path.exists() and not config.force:
        raise UsageError(
            f"{config.output_path} exists. Choose another --output-path, or add "
            "--force to replace it"
        )
    if config.run is not None:
        require_run(config.run)
    linked = companions.check_places(config)
    source = open_model(config.model)
    model = source.config
    _require_known_rotation(model, source.name)
    tables.require_blocks(model, config.embedding_type)
    entries = _rope_factors(model) + list(_entries(source, config, on_progress))
    types = Counter(entry.kind.name for entry in entries)
    vocabulary = read_vocabulary(source.path, model)
    context, notes = _context(model)
    others = companions.plan(config, source, context, vocabulary.add_bos, linked)
    with new_file(config.output_path) as partial:
        writer = GGUFWriter(None, _architecture(model))
        writer.add_name(config.output_path.stem)
        writer.add_file_type(_file_type(types, config.outtype))
        writer.add_quantization_version(2)
        _write_shape(writer, model, context)
        vocabulary.write(writer)
        if source.calibration:
            writer.add_array(CALIBRATION, source.calibration)
        try:
            _write_tensors(writer, partial, entries, on_progress)
        finally:
            writer.close()
        check = _compare(source, entries, partial, on_progress)
    weights = sum(_num_weights(entry) for entry in entries)
    result = Result(
        config.output_path,
        config.output_path.stat().st_size,
        dict(types),
        sum(entry.nbytes for entry in entries) * 8 / weights,
        context,
        weights,
        check.rounded,
        (*notes, *_code_notes(entries, config), *check.notes, *vocabulary.notes, *others.notes),
        others.write(),
    )
    add_file(config.run, result.path, result.file_bytes, result.bits_per_weight)
    return result


def _architecture(model: ModelConfig) -> str:
    """llama.cpp's name of the family; Mistral is a llama there."""
    return model.model_type if model.model_type in FAMILIES else "llama"


def _require_known_rotation(model: ModelConfig, name: str) -> None:
    if model.rope_scaling is not None and _architecture(model) != "llama":
        raise UsageError(
            f"{name} is a {model.model_type} with LLaMA-3's rescaling of frequencies "
            "(rope_scaling), which llama.cpp reads in llama models alone: export hf"
        )


def _write_shape(writer: GGUFWriter, model: ModelConfig, context: int) -> None:
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)


def _context(model: ModelConfig) -> tuple[int, tuple[str, ...]]:
    """Context length to write; at most the sliding window, which llama.cpp's graphs of these
    families do not have.
    """
    window, full = model.sliding_window, model.max_position_embeddings
    if window is None or window >= full:
        return full, ()
    return window, (
        f"llama.cpp ignores this model's sliding window of {window:,} tokens: its results are the "
        "model's "
        f"own up to {window:,} tokens, not beyond. The file's context is {window:,}, not {full:,}",
    )


def _write_tensors(
    writer: GGUFWriter, path: Path, entries: list[Entry], on_progress: Listener
) -> None:
    for entry in entries:
        writer.add_tensor_info(
            entry.name, entry.shape, entry.dtype, entry.nbytes, raw_dtype=entry.kind
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, entry in enumerate(entries):
        on_progress(Progress("export", done, len(entries), "tensors"))
        try:
            writer.write_tensor_data(np.ascontiguousarray(entry.load()))
        except OSError as error:
            if error.errno is not None:
                raise
            # numpy's `tofile` does not say why
            raise XinslmError(
                f"{path.parent}: {entry.name} could not be written to its end ({error}): the disk "
                "is full, or a limit is reached. Nothing is written"
            ) from None
    on_progress(Progress("export", len(entries), len(entries), "tensors"))


def _entries(source: ModelSource, config: GgufConfig, on_progress: Listener) -> Iterator[Entry]:
    """Entries of all weights: codes and scales where the model has them in the type asked for, or
    none is; else matrices in that type, by default float16, and norms in float32.
    """
    source.require()
    shapes = weight_shapes(source.config)
    source.require_weights(shapes)
    for done, (name, shape) in enumerate(shapes.items()):
        on_progress(Progress("read", done, len(shapes), "tensors"))
        kind: str | None = config.outtype
        if name in tables.TABLES:
            kind = config.embedding_type or kind
        weight = source.stored(name) if kind in (None, *GRIDS) else None
        if weight is not None and kind in (None, weight.format):
            yield _stored(source, name, shape, weight.format)
        else:
            yield _plain(source, name, shape, "f32" if len(shape) == 1 else kind or "f16")


def _stored(source: ModelSource, name: str, shape: tuple[int, ...], kind: str) -> Entry:
    """A weight as it is stored: blocks are copied."""

    def load() -> np.ndarray:
        weight = source.stored(name)
        assert weight is not None, "it had codes when the file was planned"
        return _reordered(weight.ggml_rows(), name, source.config)

    dtype = np.dtype(np.float16 if kind == "f16" else np.float32)
    if kind in GRIDS:
        shape = (shape[0], shape[1] // BLOCK * GRIDS[kind].block_bytes)
        dtype = np.dtype(np.uint8)
    theirs = FAMILIES[_architecture(source.config)].gguf_name(name)
    return Entry(name, theirs, GGMLQuantizationType[kind.upper()], shape, dtype, load)


def _plain(source: ModelSource, name: str, shape: tuple[int, ...], kind: str) -> Entry:
    """A weight as values of a type, or as codes of a table's type."""
    hashes: list[str] = []

    def load() -> np.ndarray:
        rows = source.rows(name, shape)
        if kind not in tables.BLOCKS:
            return _reordered(_convert(rows, kind, name), name, source.config)
        blocks, values = tables.to_blocks(rows, kind, name)
        hashes[:] = [tables.hash_values(_reordered(values.numpy(), name, source.config))]
        return _reordered(blocks, name, source.config)

    def rounding(values: Tensor) -> Tensor:
        if kind in tables.BLOCKS:
            return tables.rounded(values, kind, name)
        return values.to(_DTYPES[kind]).float()

    dtype, written = np.dtype(np.float16 if kind == "f16" else np.float32), shape
    if kind == "bf16" or kind in tables.BLOCKS:
        size, width = tables.BLOCKS.get(kind, (1, 2))
        dtype, written = np.dtype(np.uint8), (shape[0], shape[1] // size * width)
    ggml = GGMLQuantizationType[kind.upper()]
    theirs = FAMILIES[_architecture(source.config)].gguf_name(name)
    return Entry(name, theirs, ggml, written, dtype, load, rounding, hashes)


def _file_type(types: Counter[str], outtype: str | None) -> LlamaFileType:
    """llama.cpp's name for the whole: the type asked for, else that of most codes."""
    if outtype is None and types["Q4_0"] + types["Q8_0"] > types["F16"]:
        outtype = "q4_0" if types["Q4_0"] > types["Q8_0"] else "q8_0"
    return _FILE_TYPES[outtype or "f16"]


def _code_notes(entries: list[Entry], config: GgufConfig) -> tuple[str, ...]:
    """Matrices without codes next to others that have them, unless their type was asked for."""
    asked = tables.TABLES if config.embedding_type else ()
    matrices = [e for e in entries if len(e.shape) == 2 and e.weight not in asked]
    coded = {*GRIDS, *tables.BLOCKS}
    plain = [entry.weight for entry in matrices if entry.kind.name.lower() not in coded]
    if not plain or len(plain) == len(matrices):
        return ()
    more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
    return (f"{plain[0]}{more}: no codes of Q4_0 or Q8_0 in the model, written as values",)


@dataclass(frozen=True)
class _Check:
    """What reading a file back found."""

    rounded: int
    """Values that the types of the file do not hold exactly."""
    notes: tuple[str, ...]


def _compare(
    source: ModelSource, entries: list[Entry], path: Path, on_progress: Listener
) -> _Check:
    """Read the file back; XinslmError if a value is not the model's, rounded to its type."""
    written = GgufFile(path).tensors
    rounded, notes = 0, []
    for done, entry in enumerate(entries):
        on_progress(Progress("read back", done, len(entries), "tensors"))
        if not entry.weight:
            continue
        tensor = written[entry.name]
        found = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = source.rows(entry.weight, source.shape_of(entry.weight))
        _require_written(entry, found, values, source.config)
        original = _reordered(values.numpy(), entry.weight, source.config)
        changed = int((found != original).sum())
        rounded += changed
        if changed and entry.kind.name.lower() in tables.BLOCKS:
            error = tables.relative_error(found, original)
            notes.append(
                f"{entry.weight}: rounded to {entry.kind.name}, relative error {error:.2%}"
            )
    on_progress(Progress("read back", len(entries), len(entries), "tensors"))
    return _Check(rounded, tuple(notes))


def _require_written(entry: Entry, found: np.ndarray, values: Tensor, model: ModelConfig) -> None:
    """Raise XinslmError if values that were read back are not the model's, rounded to the type."""
    if entry.hashes == [tables.hash_values(found)]:
        return  # codes that are searched for need no second search
    expected = _reordered(entry.rounding(values).numpy(), entry.weight, model)
    if not np.array_equal(found, expected):
        count = int((found != expected).sum()) if found.shape == expected.shape else "all"
        raise XinslmError(
            f"{entry.weight}: {count} values differ after the export; nothing is written"
        )


def _convert(weight: Tensor, kind: str, name: str) -> np.ndarray:
    if kind == "bf16":
        return weight.bfloat16().view(torch.uint8).numpy()
    if kind == "f16" and not torch.isfinite(weight.half()).all():
        raise XinslmError(
            f"weight '{name}' has values beyond 65,504, more than float16 holds: use --outtype bf16"
        )
    return (weight.half() if kind == "f16" else weight).numpy()


def _rope_factors(model: ModelConfig) -> list[Entry]:
    """LLaMA-3's frequency rescaling as the divisors that llama.cpp reads, float32 (head_dim /
    2,).
    """
    if model.rope_scaling is None:
        return []
    factors = (
        rotary_frequencies(replace(model, rope_scaling=None)) / rotary_frequencies(model)
    ).numpy()
    return [
        Entry(
            "",
            "rope_freqs.weight",
            GGMLQuantizationType.F32,
            factors.shape,
            factors.dtype,
            lambda: factors,
        )
    ]


def _reordered(rows: np.ndarray, name: str, model: ModelConfig) -> np.ndarray:
    return FAMILIES[_architecture(model)].for_rotation(rows, name, model.head_dim)


def _num_weights(entry: Entry) -> int:
    from gguf import quant_shape_from_byte_shape

    values = (
        quant_shape_from_byte_shape(entry.shape, entry.kind)
        if entry.dtype == np.uint8
        else entry.shape
    )
    return math.prod(values)
