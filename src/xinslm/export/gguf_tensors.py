"""The tensors of a GGUF file: from which weight each comes, in which type, and its bytes.

Memory holds one tensor at a time: an `Entry` reads its weight when it is written. Codes that the
export chose itself (`calibrated.py`) are all in memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.export import tables
from xinslm.export.calibrated import Body, table_type
from xinslm.export.config import GgufConfig
from xinslm.model.config import ModelConfig
from xinslm.model.finite import all_finite
from xinslm.model.gguf_families import FAMILIES
from xinslm.model.grids import BLOCK, GRIDS
from xinslm.model.source import ModelSource
from xinslm.model.transformer import rotary_frequencies
from xinslm.progress import Listener, Progress
from xinslm.quantize.block_types import Coded


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


Shapes = dict[str, tuple[int, ...]]


def entries(
    source: ModelSource, shapes: Shapes, config: GgufConfig, on_progress: Listener
) -> Iterator[Entry]:
    """Entries of all weights: codes and scales where the model has them in the type asked for, or
    none is; else matrices in that type, by default float16, and norms in float32.
    """
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


def fitted_entries(
    source: ModelSource, shapes: Shapes, config: GgufConfig, body: Body
) -> Iterator[Entry]:
    """Entries of all weights for `--outtype q4_k`, whose linears are in `body`."""
    for name, shape in shapes.items():
        if name in body.coded:
            yield _coded(source, name, body.coded[name])
        elif name in tables.TABLES:
            yield _plain(source, name, shape, table_type(source, config.embedding_type))
        else:
            yield _plain(source, name, shape, body.plain.get(name, "f32"))


def _coded(source: ModelSource, name: str, coded: Coded) -> Entry:
    """A weight whose codes were chosen here."""

    def load() -> np.ndarray:
        return reordered(coded.pack(), name, source.config)

    rows, columns = coded.codes.shape
    shape = (rows, columns // BLOCK * coded.grid.block_bytes)
    kind = GGMLQuantizationType[coded.kind]
    theirs = FAMILIES[architecture(source.config)].gguf_name(name)
    return Entry(name, theirs, kind, shape, np.dtype(np.uint8), load, lambda values: coded.decode())


def _stored(source: ModelSource, name: str, shape: tuple[int, ...], kind: str) -> Entry:
    """A weight as it is stored: blocks are copied."""

    def load() -> np.ndarray:
        weight = source.stored(name)
        assert weight is not None, "it had codes when the file was planned"
        return reordered(weight.ggml_rows(), name, source.config)

    dtype = np.dtype(np.float16 if kind == "f16" else np.float32)
    if kind in GRIDS:
        shape = (shape[0], shape[1] // BLOCK * GRIDS[kind].block_bytes)
        dtype = np.dtype(np.uint8)
    theirs = FAMILIES[architecture(source.config)].gguf_name(name)
    return Entry(name, theirs, GGMLQuantizationType[kind.upper()], shape, dtype, load)


def _plain(source: ModelSource, name: str, shape: tuple[int, ...], kind: str) -> Entry:
    """A weight as values of a type, or as codes of a table's type."""
    hashes: list[str] = []

    def load() -> np.ndarray:
        rows = source.rows(name, shape)
        if kind not in tables.BLOCKS:
            return reordered(_convert(rows, kind, name), name, source.config)
        blocks, values = tables.to_blocks(rows, kind, name)
        hashes[:] = [tables.hash_values(reordered(values.numpy(), name, source.config))]
        return reordered(blocks, name, source.config)

    def rounding(values: Tensor) -> Tensor:
        if kind in tables.BLOCKS:
            return tables.rounded(values, kind, name)
        return values.to(tables.DTYPES[kind]).float()

    dtype, written = np.dtype(np.float16 if kind == "f16" else np.float32), shape
    if kind == "bf16" or kind in tables.BLOCKS:
        size, width = tables.BLOCKS.get(kind, (1, 2))
        dtype, written = np.dtype(np.uint8), (shape[0], shape[1] // size * width)
    ggml = GGMLQuantizationType[kind.upper()]
    theirs = FAMILIES[architecture(source.config)].gguf_name(name)
    return Entry(name, theirs, ggml, written, dtype, load, rounding, hashes)


def _convert(weight: Tensor, kind: str, name: str) -> np.ndarray:
    if kind == "bf16":
        return weight.bfloat16().view(torch.uint8).numpy()
    if kind == "f16" and not all_finite(weight.half()):
        raise XinslmError(
            f"weight '{name}' has values beyond 65,504, more than float16 holds: use --outtype bf16"
        )
    return (weight.half() if kind == "f16" else weight).numpy()


def rope_factors(model: ModelConfig) -> list[Entry]:
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


def architecture(model: ModelConfig) -> str:
    """llama.cpp's name of the family; Mistral is a llama there."""
    return model.model_type if model.model_type in FAMILIES else "llama"


def reordered(rows: np.ndarray, name: str, model: ModelConfig) -> np.ndarray:
    """Rows of a weight in the order that llama.cpp rotates queries and keys in."""
    return FAMILIES[architecture(model)].for_rotation(rows, name, model.head_dim)


def num_weights(entry: Entry) -> int:
    """Number of values of a tensor."""
    from gguf import quant_shape_from_byte_shape

    values = (
        quant_shape_from_byte_shape(entry.shape, entry.kind)
        if entry.dtype == np.uint8
        else entry.shape
    )
    return math.prod(values)
