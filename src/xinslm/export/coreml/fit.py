"""Palettes for a whole model: 4 bits for linear layers, 8 for the embedding and the LM head.

With calibration rows this is GPTAQ (`quantize/gptq.py`) on tables instead of Q4_0's grid. Layers
are fitted one after another to the inputs that the fitted ones give. The tables come from k-means
of the weights that GPTAQ aims at, each column weighed by 1 / diag(H^-1), and each column's error
moves onto the remaining columns. Without rows it is k-means and the nearest number.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from xinslm.data.packing import Batch
from xinslm.export.coreml.convert import require_half
from xinslm.export.coreml.palettes import Palette, fit_palette
from xinslm.export.tables import TABLES
from xinslm.model.source import TABLE, ModelSource
from xinslm.progress import Listener
from xinslm.quantize.gptq import Factor, layer_loss
from xinslm.quantize.sequential import Walk, fit_linears

_TABLE_ROWS = 8192
_FEW_COLUMNS = 32


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
    for name in TABLES:
        if name in shapes and shapes[name][0] % group_size == 0:
            palettes[name] = _fit_table(source, name, shapes[name], group_size)

    def fit(name: str, weight: Tensor, factor: Factor | None) -> Tensor:
        require_half(name, weight)
        if len(weight) % group_size:
            return weight.half().float()
        palettes[name] = fit_linear(weight, group_size, factor)
        return palettes[name].decode()

    def stored_table(table: Tensor) -> Tensor:
        return palettes[TABLE].decode() if TABLE in palettes else table.half().float()

    fit_linears(Walk(source, shapes, batches, stored_table, "palettize"), fit, on_progress)
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


def fit_linear(weight: Tensor, group_size: int, factor: Factor | None) -> Palette:
    """Palette of 4 bits for weights (rows, columns): with a factor, the better one of error
    feedback and the nearest numbers by the layer's squared output error.
    """
    if factor is None:
        return fit_palette(weight, 4, group_size)
    wanted = factor.aim(weight)
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
