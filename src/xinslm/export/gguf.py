"""`xinslm export gguf`: one file for llama.cpp and programs built on it.

A quantized folder is transcribed: its codes and scales become llama.cpp's Q4_0 and Q8_0 blocks bit
for bit, without rounding again. Query and key rows are reordered, because llama.cpp rotates
neighbouring pairs and Hugging Face rotates (i, i + D/2); blocks run along columns, so this works on
packed bytes. Memory holds one tensor at a time.

    run(GgufConfig(model=Path("model-4bit"), output_path=Path("model.gguf")))
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.export import companions
from xinslm.export.config import GgufConfig
from xinslm.export.vocabulary import read_vocabulary
from xinslm.files import new_file
from xinslm.model.config import ModelConfig
from xinslm.model.files import open_model
from xinslm.model.grids import BLOCK, GRIDS
from xinslm.model.quantized import QuantizedSource
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.model.transformer import rotary_frequencies
from xinslm.progress import Listener, Progress, ignore
from xinslm.runs import add_row, require_run

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
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

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows and columns as written: blocks counted in bytes (uint8), or values."""
    dtype: np.dtype
    load: Callable[[], np.ndarray]

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
    notes: tuple[str, ...]
    written: tuple[Path, ...] = ()
    """What was written with it: the Modelfile, LM Studio's link."""

    def describe(self) -> str:
        """A few lines for the terminal."""
        census = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        return "\n".join(
            [
                f"tensors {census}",
                f"size    {self.file_bytes / 2**20:.2f} MiB, {self.bits_per_weight:.3f} bits a "
                "weight",
                f"context {self.context_length:,} tokens",
                *(f"note    {note}" for note in self.notes),
                *(f"output  {path}" for path in (self.path, *self.written)),
            ]
        )


def run(config: GgufConfig, on_progress: Listener = ignore) -> Result:
    """Write a GGUF file of a quantized folder, bit for bit, or of any other model."""
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
    entries = _rope_factors(model)
    if isinstance(source, QuantizedSource) and config.outtype is None:
        entries += list(_stored(source))
        file_type = "q4_0" if source.manifest["bits"] == 4 else "q8_0"
    else:
        file_type = config.outtype or "f16"
        entries += list(_plain(source, file_type))
    vocabulary = read_vocabulary(source.path, model)
    context, notes = _context(model)
    others = companions.plan(config, source, context, vocabulary.add_bos, linked)
    with new_file(config.output_path) as partial:
        writer = GGUFWriter(None, "llama")
        writer.add_name(config.output_path.stem)
        writer.add_file_type(_FILE_TYPES[file_type])
        writer.add_quantization_version(2)
        _write_shape(writer, model, context)
        vocabulary.write(writer)
        try:
            _write_tensors(writer, partial, entries, on_progress)
        finally:
            writer.close()
    weights = sum(_num_weights(entry) for entry in entries)
    result = Result(
        config.output_path,
        config.output_path.stat().st_size,
        dict(Counter(entry.kind.name for entry in entries)),
        sum(entry.nbytes for entry in entries) * 8 / weights,
        context,
        (*notes, *vocabulary.notes, *others.notes),
        others.write(),
    )
    if config.run is not None:
        row = {"name": result.path.name, "path": str(result.path), "bytes": result.file_bytes}
        add_row(config.run, "files.json", row | {"bits_per_weight": result.bits_per_weight})
    return result


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
    """Context length to write; at most the sliding window, which llama.cpp's llama graph does not
    have.
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
        writer.write_tensor_data(np.ascontiguousarray(entry.load()))
    on_progress(Progress("export", len(entries), len(entries), "tensors"))


def _stored(model: QuantizedSource) -> Iterator[Entry]:
    """Entries of a quantized folder: blocks are copied."""
    for name, kind in model.formats.items():

        def load(name: str = name) -> np.ndarray:
            return _for_rotary(model.stored(name).ggml_rows(), name, model.config)

        shape, dtype = model.shape_of(name), np.dtype(np.float16 if kind == "f16" else np.float32)
        if kind in GRIDS:
            shape, dtype = (
                (shape[0], shape[1] // BLOCK * GRIDS[kind].block_bytes),
                np.dtype(np.uint8),
            )
        yield Entry(gguf_name(name), GGMLQuantizationType[kind.upper()], shape, dtype, load)


def _plain(source: ModelSource, dtype: str) -> Iterator[Entry]:
    """Entries of any model: matrices in `dtype`, norms in float32."""
    source.require()
    for name, shape in weight_shapes(source.config).items():
        kind = "f32" if len(shape) == 1 else dtype

        def load(name: str = name, shape: tuple[int, ...] = shape, kind: str = kind) -> np.ndarray:
            return _for_rotary(_convert(source.rows(name, shape), kind, name), name, source.config)

        if name not in source.names:
            raise XinslmError(f"{source.path}: weight '{name}' is missing")
        entry = Entry(
            gguf_name(name), GGMLQuantizationType[kind.upper()], shape, np.dtype(np.float32), load
        )
        if kind == "f16":
            entry = replace(entry, dtype=np.dtype(np.float16))
        elif kind == "bf16":
            entry = replace(entry, dtype=np.dtype(np.uint8), shape=(shape[0], 2 * shape[1]))
        yield entry


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
            "rope_freqs.weight",
            GGMLQuantizationType.F32,
            factors.shape,
            factors.dtype,
            lambda: factors,
        )
    ]


def _for_rotary(rows: np.ndarray, name: str, model: ModelConfig) -> np.ndarray:
    """Reorder query and key rows within each head from (2, D/2) to (D/2, 2); leave other
    weights.
    """
    if ".q_proj." not in name and ".k_proj." not in name:
        return rows
    return (
        rows.reshape(-1, 2, model.head_dim // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    )


def gguf_name(name: str) -> str:
    """Translate a Hugging Face name: 'model.layers.0.mlp.up_proj.weight' ->
    'blk.0.ffn_up.weight'.
    """
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _num_weights(entry: Entry) -> int:
    from gguf import quant_shape_from_byte_shape

    values = (
        quant_shape_from_byte_shape(entry.shape, entry.kind)
        if entry.dtype == np.uint8
        else entry.shape
    )
    return math.prod(values)
