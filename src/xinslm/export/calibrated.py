"""`export gguf --outtype q4_k`: the linears of an unquantized model, rounded anew to types that
llama.cpp alone reads (`quantize/block_types.py`): Q4_K, and Q5_0 for rows that do not fit it.

With --data-path codes are chosen by GPTAQ, layer after layer (`quantize/sequential.py`), and the
file's KL divergence is measured on the dataset's validation split; without it they are rounded to
nearest. Memory: 5 bytes a weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from xinslm.data.packing import Batch
from xinslm.errors import UsageError
from xinslm.export import tables
from xinslm.export.card import Export, commands, make_card
from xinslm.export.config import CALIBRATED, GgufConfig
from xinslm.export.cost import ROW_TOKENS, Cost, Divergence, divergence, held_out_rows
from xinslm.export.cost import squared_error as error_of
from xinslm.model.files import open_model
from xinslm.model.grids import BLOCK
from xinslm.model.source import TABLE, ModelSource
from xinslm.precision import use_fast_float32
from xinslm.progress import Listener
from xinslm.quantize.block_types import Coded, block_type, fit_linear
from xinslm.quantize.calibration import CalibrationRows, RowShape, dataset_rows
from xinslm.quantize.gptq import DRIFT_TOKENS, Factor
from xinslm.quantize.sequential import Walk, fit_linears
from xinslm.quantize.weights import Facts
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer

_LEAST_BITS = 12
"""Bits a stored weight below which a model must have been quantized, in whatever format."""


@dataclass(frozen=True)
class Body:
    """The linears of a model, fitted."""

    coded: dict[str, Coded] = field(default_factory=dict)
    """By name of weight."""
    plain: dict[str, str] = field(default_factory=dict)
    """Those that no type holds: f16 or f32."""
    errors: dict[str, float] = field(default_factory=dict)
    """By name of weight: squared error over the squared weights."""
    facts: Facts = field(default_factory=Facts)
    """Layer losses, and what was done otherwise than asked."""
    is_calibrated: bool = False
    rows: CalibrationRows | None = None
    """The rows that calibrated, if any did."""
    held_out: list[Batch] = field(default_factory=list)
    """Validation rows, one a batch."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done otherwise than asked, a sentence each."""
        return (*(self.rows.notes if self.rows is not None else ()), *self.facts.notes)

    @property
    def texts(self) -> list[str]:
        """Ids of the texts that calibrated."""
        return [] if self.rows is None else self.rows.texts


def table_type(source: ModelSource, wanted: str | None) -> str:
    """Type of the embedding and the LM head: what was asked for, else Q8_0 if it fits."""
    return wanted or ("q8_0" if source.config.hidden_size % BLOCK == 0 else "f16")


def choose_body(
    config: GgufConfig,
    source: ModelSource,
    shapes: dict[str, tuple[int, ...]],
    on_progress: Listener,
) -> Body:
    """Choose the codes of all linears as a configuration says; UsageError for a model that is
    quantized already, or a dataset that does not fit it.
    """
    _require_unquantized(source, shapes)
    rows, held_out = None, []
    if config.data_path is not None:
        tokenizer = load_tokenizer(config.model)
        check_vocabulary(source.config.vocab_size, tokenizer, str(config.model))
        length = min(source.config.max_position_embeddings, ROW_TOKENS)
        shape = RowShape(config.num_calibration_samples, length)
        rows = dataset_rows(config.data_path, tokenizer, source.config, shape, seed=0)
        held_out = held_out_rows(config.data_path, length)
    batches = [] if rows is None else rows.batches
    table = table_type(source, config.embedding_type)
    body = fit_body(source, shapes, table, batches, on_progress)
    source.require_unchanged()
    return replace(body, rows=rows, held_out=held_out)


def fit_body(
    source: ModelSource,
    shapes: dict[str, tuple[int, ...]],
    table: str,
    batches: list[Batch],
    on_progress: Listener,
) -> Body:
    """Choose the codes of all linears, with calibration rows or without, for an embedding of type
    `table`.
    """
    use_fast_float32()
    body = Body(is_calibrated=bool(batches))

    def fit(name: str, weight: Tensor, factor: Factor | None) -> Tensor:
        return _fit(body, name, weight, factor)

    walk = Walk(source, shapes, batches, _rounded_table(table), "quantize")
    fit_linears(walk, fit, on_progress)
    return body


def _require_unquantized(source: ModelSource, shapes: dict[str, tuple[int, ...]]) -> None:
    stored = (source.stored(name) for name, shape in shapes.items() if len(shape) > 1)
    has_codes = any(weight is not None and weight.scales is not None for weight in stored)
    if has_codes or 8 * source.weight_bytes < _LEAST_BITS * source.num_weights:
        raise UsageError(
            f"--outtype {CALIBRATED} chooses codes anew, and {source.name} is quantized already: "
            "rounding twice loses more than either. Give the model before it was quantized, or "
            "leave out --outtype, which keeps codes of Q4_0 and Q8_0"
        )


def _rounded_table(kind: str) -> Callable[[Tensor], Tensor]:
    """From the embedding to the values of a type."""

    def rounded(table: Tensor) -> Tensor:
        if kind in tables.BLOCKS:
            return tables.rounded(table, kind, TABLE)
        return table.to(tables.DTYPES[kind]).float()

    return rounded


def _fit(body: Body, name: str, weight: Tensor, factor: Factor | None) -> Tensor:
    """Choose the codes of one weight and keep them; return the stored values."""
    facts, stem, columns = body.facts, name.removesuffix(".weight"), weight.shape[1]
    kind = block_type(columns)
    if kind is None:
        facts.note(stem, f"rows of {columns} are no multiple of {BLOCK}, kept unquantized")
        return _keep(body, name, weight)
    try:
        fitted = fit_linear(weight, kind, factor)
    except ValueError:
        facts.note(stem, "magnitudes that float16 scales cannot hold, kept unquantized")
        return _keep(body, name, weight)
    if kind.kind != CALIBRATED.upper():
        facts.note(
            stem,
            f"rows of {columns} are no multiple of 256: {kind.kind}, {kind.grid.bits_per_weight} "
            "bits a weight, as llama.cpp's own quantizer takes",
        )
    if body.is_calibrated and factor is None:
        facts.note(stem, "no damping makes its inputs' Hessian invertible, rounded to nearest")
    elif factor is not None:
        if factor.shift is None:
            facts.note(
                stem,
                f"fewer than {DRIFT_TOKENS} calibration tokens for each column, too few for GPTAQ: "
                "GPTQ was used",
            )
        if fitted.method == "rtn":
            facts.note(stem, "GPTQ did not beat rounding to nearest, which was kept")
        facts.losses[stem] = {"loss": fitted.loss, "rtn_loss": fitted.rtn_loss}
    body.coded[name] = fitted.coded
    stored = fitted.coded.decode()
    body.errors[name] = error_of(stored, weight)
    return stored


def _keep(body: Body, name: str, weight: Tensor) -> Tensor:
    """Keep a weight in float16, or in float32 if that loses precision."""
    half = weight.half().float()
    lost = (half - weight).double().square().sum()
    is_half = bool(torch.isfinite(half).all() and lost <= 1e-6 * weight.double().square().sum())
    body.plain[name] = "f16" if is_half else "f32"
    return half if is_half else weight


def measure(
    config: GgufConfig, source: ModelSource, body: Body, file: Path, on_progress: Listener
) -> tuple[str, ...]:
    """Sentences on what a written file costs; its own weights are measured."""
    found: Divergence | None = None
    if body.held_out:
        stored = open_model(file).tensors()
        found = divergence(source, stored, body.held_out, on_progress)
    kinds = {name: f"matrices of {coded.kind}" for name, coded in body.coded.items()}
    text = "" if config.data_path is None else config.data_path.resolve().name
    return (_how(body, text), *Cost(body.errors, kinds, found, text).describe())


def _how(body: Body, text: str) -> str:
    if body.rows is None:
        return (
            "matrices rounded to nearest, without calibration text, which loses more: --data-path "
            "calibrates"
        )
    facts = body.rows.facts
    line = f"codes chosen by GPTAQ with {facts['rows']:,} rows of {facts['max_seq_length']:,} "
    line += f"tokens of {text}"
    pairs = [(loss["loss"], loss["rtn_loss"]) for loss in body.facts.losses.values()]
    ratios = [math.log(loss / rtn) for loss, rtn in pairs if loss and rtn]
    if not ratios:
        return line
    ratio = math.exp(sum(ratios) / len(ratios))
    return f"{line}; layer loss {ratio:.3f} of rounding to nearest (geometric mean)"


def compose_card(
    config: GgufConfig,
    source: ModelSource,
    types: dict[str, int],
    context: int,
    measured: tuple[str, ...],
) -> str:
    """The model card of a file that is in place."""
    file = config.output_path
    runs = commands("gguf", file.name, True)
    if not config.ollama:
        del runs["Ollama"]
    size = file.stat().st_size
    export = Export(source, "gguf", file.name, size, types, context, runs, config.run, measured)
    return make_card(export)
