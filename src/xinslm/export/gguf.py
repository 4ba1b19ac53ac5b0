"""`xinslm export gguf`: one file for llama.cpp and programs built on it.

The codes and scales of a quantized folder, and of any other model that has codes on these grids
(`ModelSource.stored`), become llama.cpp's Q4_0 and Q8_0 blocks bit for bit, without rounding again.
The query and key rows of LLaMA and Mistral are reordered, because llama.cpp rotates neighbouring
pairs there and Hugging Face rotates (i, i + D/2); blocks run along columns, so this works on packed
bytes. With `--outtype q4_k` linears get new codes (`calibrated.py`). The file is read back by
llama.cpp's own package before it is put in place. Memory holds one tensor at a time.

    run(GgufConfig(model=Path("model-4bit"), output_path=Path("model.gguf")))
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType

from xinslm.errors import UsageError, XinslmError
from xinslm.export import calibrated, companions, tables
from xinslm.export.calibrated import Body
from xinslm.export.config import CALIBRATED, GgufConfig
from xinslm.export.gguf_check import compare
from xinslm.export.gguf_tensors import (
    Entry,
    Shapes,
    architecture,
    entries,
    fitted_entries,
    num_weights,
    rope_factors,
)
from xinslm.export.vocabulary import read_vocabulary
from xinslm.files import new_file
from xinslm.model.config import ModelConfig
from xinslm.model.files import open_model
from xinslm.model.gguf import CALIBRATION
from xinslm.model.grids import GRIDS
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.progress import Listener, Progress, ignore
from xinslm.runs import add_file, require_run

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


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
    """Values that the types of the file do not hold exactly; codes that the model had are exact."""
    notes: tuple[str, ...]
    written: tuple[Path, ...] = ()
    """What was written with it: the Modelfile, LM Studio's link, the model card."""
    measured: tuple[str, ...] = ()
    """What codes cost that were chosen here, a sentence each."""

    def describe(self) -> str:
        """A few lines for the terminal."""
        census = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        equal = f"all {self.weights:,} values equal the model's"
        if self.rounded:
            equal = f"{self.rounded:,} of {self.weights:,} values rounded, all others equal"
        if self.measured:
            equal = f"all {self.weights:,} values are those of the codes that were chosen"
        return "\n".join(
            [
                f"tensors {census}",
                f"size    {self.file_bytes / 2**20:.2f} MiB, {self.bits_per_weight:.3f} bits a "
                "weight",
                f"context {self.context_length:,} tokens",
                f"check   read back: {equal}",
                *(f"cost    {line}" for line in self.measured),
                *(f"note    {note}" for note in self.notes),
                *(f"output  {path}" for path in (self.path, *self.written)),
            ]
        )


def run(config: GgufConfig, on_progress: Listener = ignore) -> Result:
    """Write a GGUF file of any model; without `outtype`, what has codes keeps them bit for bit."""
    config.check()
    _refuse_existing(config)
    if config.run is not None:
        require_run(config.run)
    linked = companions.check_places(config)
    source = open_model(config.model)
    model = source.config
    _require_known_rotation(model, source.name)
    tables.require_blocks(model, config.embedding_type)
    source.require()
    shapes = weight_shapes(model)
    source.require_weights(shapes)
    vocabulary = read_vocabulary(source.path, model)
    context, notes = _context(model)
    others = companions.plan(config, source, context, vocabulary.add_bos, linked)
    plan = _plan(config, source, shapes, on_progress)
    types = Counter(entry.kind.name for entry in plan.entries)
    with new_file(config.output_path) as partial:
        writer = GGUFWriter(None, architecture(model))
        writer.add_name(config.output_path.stem)
        writer.add_file_type(_file_type(types, config.outtype))
        writer.add_quantization_version(2)
        _write_shape(writer, model, context)
        vocabulary.write(writer)
        if plan.calibration:
            writer.add_array(CALIBRATION, plan.calibration)
        try:
            _write_tensors(writer, partial, plan.entries, on_progress)
        finally:
            writer.close()
        check = compare(source, plan.entries, partial, on_progress)
        measured = plan.measure(config, source, partial, on_progress)
    written = others.write()
    if measured:
        lines = (*measured, *plan.notes, *check.notes)
        card = calibrated.compose_card(config, source, types, context, lines)
        written += (companions.write_card(config.output_path, card),)
    weights = sum(num_weights(entry) for entry in plan.entries)
    result = Result(
        config.output_path,
        config.output_path.stat().st_size,
        dict(types),
        sum(entry.nbytes for entry in plan.entries) * 8 / weights,
        context,
        weights,
        check.rounded,
        (*notes, *plan.notes, *check.notes, *vocabulary.notes, *others.notes),
        written,
        measured,
    )
    add_file(config.run, result.path, result.file_bytes, result.bits_per_weight)
    return result


@dataclass(frozen=True)
class _Plan:
    """What is to be written, and what is known of it."""

    entries: list[Entry]
    calibration: list[str]
    """Ids of the texts that calibrated the model's codes, before or now."""
    notes: tuple[str, ...]
    body: Body | None = None
    """Linears whose codes were chosen here."""

    def measure(
        self, config: GgufConfig, source: ModelSource, file: Path, on_progress: Listener
    ) -> tuple[str, ...]:
        """Sentences on what codes cost that were chosen here, measured on the written file."""
        if self.body is None:
            return ()
        return calibrated.measure(config, source, self.body, file, on_progress)


def _plan(config: GgufConfig, source: ModelSource, shapes: Shapes, on_progress: Listener) -> _Plan:
    factors = rope_factors(source.config)
    if config.outtype != CALIBRATED:
        planned = list(entries(source, shapes, config, on_progress))
        return _Plan(factors + planned, source.calibration, _code_notes(planned, config))
    body = calibrated.choose_body(config, source, shapes, on_progress)
    planned = list(fitted_entries(source, shapes, config, body))
    texts = sorted({*source.calibration, *body.texts})
    return _Plan(factors + planned, texts, body.notes, body)


def _refuse_existing(config: GgufConfig) -> None:
    if config.output_path.is_dir():
        raise UsageError(
            f"--output-path {config.output_path} is a folder; name a file, such as model.gguf in it"
        )
    if config.output_path.exists() and not config.force:
        raise UsageError(
            f"{config.output_path} exists. Choose another --output-path, or add "
            "--force to replace it"
        )


def _require_known_rotation(model: ModelConfig, name: str) -> None:
    if model.rope_scaling is not None and architecture(model) != "llama":
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
    writer: GGUFWriter, path: Path, planned: list[Entry], on_progress: Listener
) -> None:
    for entry in planned:
        writer.add_tensor_info(
            entry.name, entry.shape, entry.dtype, entry.nbytes, raw_dtype=entry.kind
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, entry in enumerate(planned):
        on_progress(Progress("export", done, len(planned), "tensors"))
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
    on_progress(Progress("export", len(planned), len(planned), "tensors"))


def _file_type(types: Counter[str], outtype: str | None) -> LlamaFileType:
    """llama.cpp's name for the whole: the type asked for, else that of most codes."""
    if outtype == CALIBRATED and types["Q5_0"] >= types["Q4_K"]:
        outtype = "q5_0" if types["Q5_0"] else "f16"
    if outtype is None and types["Q4_0"] + types["Q8_0"] > types["F16"]:
        outtype = "q4_0" if types["Q4_0"] > types["Q8_0"] else "q8_0"
    return _FILE_TYPES[outtype or "f16"]


def _code_notes(planned: list[Entry], config: GgufConfig) -> tuple[str, ...]:
    """Matrices without codes next to others that have them, unless their type was asked for."""
    asked = tables.TABLES if config.embedding_type else ()
    matrices = [e for e in planned if len(e.shape) == 2 and e.weight not in asked]
    coded = {*GRIDS, *tables.BLOCKS}
    plain = [entry.weight for entry in matrices if entry.kind.name.lower() not in coded]
    if not plain or len(plain) == len(matrices):
        return ()
    more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
    return (f"{plain[0]}{more}: no codes of Q4_0 or Q8_0 in the model, written as values",)
