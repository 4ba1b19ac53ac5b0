"""Palettes for a whole model: 4 bits for linear layers, 8 for the embedding and the LM head.

With calibration rows this is GPTAQ (`quantize/gptq.py`) on tables instead of Q4_0's grid. Layers
are fitted one after another to the inputs that the fitted ones give. The tables come from k-means
of the weights that GPTAQ aims at, each column weighed by 1 / diag(H^-1), and each column's error
moves onto the remaining columns. Without rows it is k-means and the nearest number.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from xinslm.data.packing import Batch
from xinslm.errors import XinslmError
from xinslm.export.coreml.convert import require_half
from xinslm.export.coreml.palettes import Palette, fit_palette
from xinslm.model.source import ModelSource
from xinslm.model.transformer import Block
from xinslm.progress import Listener, Progress
from xinslm.quantize.activations import Blocks, Calibration
from xinslm.quantize.gptq import Factor, factorise, layer_loss
from xinslm.quantize.pipeline import LINEARS

_TABLE_ROWS = 8192
_FEW_COLUMNS = 32
_STAGE = "palettize"


@torch.no_grad()
def fit_palettes(
    source: ModelSource,
    shapes: Mapping[str, tuple[int, ...]],
    group_size: int,
    batches: list[Batch],
    on_progress: Listener,
) -> dict[str, Palette]:
    """Palettes by name of weight, for all matrices whose rows `group_size` divides.

    `batches` calibrate; none for k-means alone. UsageError if float16 does not hold a weight.
    """
    palettes = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in shapes and shapes[name][0] % group_size == 0:
            palettes[name] = _fit_table(source, name, shapes[name], group_size)
    count = source.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        calibration = None
        if batches:
            calibration = Calibration(source.config, batches, Path(folder), with_original=True)
            _begin(calibration, source, shapes, palettes, batches)
        for index in range(count):
            on_progress(Progress(_STAGE, index, count, "layers"))
            prefix = f"model.layers.{index}."
            fitted = _fit_layer(_blocks(source, shapes, index), prefix, group_size, calibration)
            palettes |= fitted
            if calibration is not None:
                calibration.finish_layer()
                calibration.forget_before(index + 1)
    on_progress(Progress(_STAGE, count, count, "layers"))
    return palettes


def _fit_table(source: ModelSource, name: str, shape: tuple[int, ...], group_size: int) -> Palette:
    """Palette of an embedding, whose rows are read in parts."""
    step = _TABLE_ROWS - _TABLE_ROWS % group_size
    parts = []
    for start in range(0, shape[0], step):
        rows = source.rows(name, shape, start, min(start + step, shape[0]))
        require_half(name, rows)
        parts.append(fit_palette(rows, 8, group_size))
    indices, tables = (torch.cat([getattr(p, key) for p in parts]) for key in ("indices", "tables"))
    return Palette(indices, tables)


def _begin(
    calibration: Calibration,
    source: ModelSource,
    shapes: Mapping[str, tuple[int, ...]],
    palettes: Mapping[str, Palette],
    batches: list[Batch],
) -> None:
    """Write the rows' embeddings: those of the palette, and those before."""
    name = "model.embed_tokens.weight"
    original = source.rows(name, shapes[name])
    stored = palettes[name].decode() if name in palettes else original.half().float()
    calibration.begin()
    for stream, table in zip(calibration.streams, (stored, original), strict=True):
        for index, batch in enumerate(batches):
            stream.states.write(index, table[torch.from_numpy(batch.input_ids)])


def _blocks(source: ModelSource, shapes: Mapping[str, tuple[int, ...]], index: int) -> Blocks:
    """One layer twice, with the same tensors, until one is replaced."""
    prefix = f"model.layers.{index}."
    with torch.device("meta"):
        blocks = Blocks(Block(source.config, index), Block(source.config, index))
    weights = {
        name.removeprefix(prefix): source.rows(name, shape)
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
    for block in (blocks.quantized, blocks.original):
        block.load_state_dict(weights, assign=True)
    return blocks


def _fit_layer(
    blocks: Blocks, prefix: str, group_size: int, calibration: Calibration | None
) -> dict[str, Palette]:
    """Palettes of one block's linears, whose numbers are put in place."""
    palettes = {}
    for part, groups in LINEARS.items():
        half = blocks.quantized.get_submodule(part)
        for group in groups:
            factor = None
            if calibration is not None:
                is_last = group == groups[-1]
                hessian = calibration.hessian(blocks, part, group[0], is_last)
                if not hessian.is_finite:
                    raise XinslmError(
                        f"on the calibration text, the inputs of {prefix}{part}.{group[0]} are "
                        "NaN, infinite or too large to square in float32: leave out --data-path"
                    )
                factor = factorise(hessian.mean(), hessian.drift())
            for stem in group:
                name = f"{prefix}{part}.{stem}.weight"
                linear = cast(nn.Linear, half.get_submodule(stem))
                require_half(name, linear.weight)
                if linear.out_features % group_size:
                    linear.weight = nn.Parameter(linear.weight.half().float())
                    continue
                palettes[name] = fit_linear(linear.weight.data, group_size, factor)
                linear.weight = nn.Parameter(palettes[name].decode())
        if calibration is not None:
            calibration.advance(blocks, part, groups[-1][-1])
    return palettes


def fit_linear(weight: Tensor, group_size: int, factor: Factor | None) -> Palette:
    """Palette of 4 bits for weights (rows, columns): with a factor, the better one of error
    feedback and the nearest numbers by the layer's squared output error.
    """
    if factor is None:
        return fit_palette(weight, 4, group_size)
    wanted = weight if factor.shift is None else weight + weight @ factor.shift
    nearest = fit_palette(wanted, 4, group_size, factor.hessian.diagonal())
    tables = fit_palette(wanted, 4, group_size, factor.importance).tables
    fed_back = Palette(feed_back_errors(wanted, tables, factor), tables)
    return min(
        (fed_back, nearest), key=lambda found: layer_loss(wanted, found.decode(), factor.hessian)
    )


def feed_back_errors(weight: Tensor, tables: Tensor, factor: Factor) -> Tensor:
    """Choose indices, uint8 (rows, columns), for fixed tables (groups, entries)."""
    order = factor.order
    work = weight.T[order].contiguous()  # (columns, rows): a column's weights lie together
    numbers = tables.float().repeat_interleave(len(weight) // len(tables), 0).T.contiguous()
    chosen = torch.empty_like(work, dtype=torch.uint8)
    _choose_columns(work, numbers, factor.upper, chosen)
    restored = torch.empty_like(chosen)
    restored[order] = chosen
    return restored.T.contiguous()


def _choose_columns(work: Tensor, numbers: Tensor, upper: Tensor, chosen: Tensor) -> None:
    """Fill `chosen` for columns of weights `work` (columns, rows), which becomes their errors;
    `numbers` (entries, rows). By halves: the first half's errors reach the second in one product.
    """
    if len(work) > _FEW_COLUMNS:
        half = len(work) // 2
        _choose_columns(work[:half], numbers, upper[:half, :half], chosen[:half])
        work[half:].addmm_(upper[:half, half:].T, work[:half], alpha=-1)
        _choose_columns(work[half:], numbers, upper[half:, half:], chosen[half:])
        return
    middles = (numbers[1:] + numbers[:-1]) / 2
    for i, column in enumerate(work):
        column -= upper[:i, i] @ work[:i]
        index = (column > middles).sum(0)
        column -= numbers.gather(0, index[None])[0]
        chosen[i] = index
