"""Weights as indices into tables of 16 or 256 float16 numbers: Core ML's palettization.

A table serves a group of neighbouring rows (coremltools' `per_grouped_channel`). Its numbers come
from weighted k-means in one dimension: Lloyd's steps on sorted weights with running sums, so that a
step costs a binary search for each number. They start where Panter and Dite (1951) put the levels
of the best quantizer: their density is the cube root of that of the weights.

    palette = fit_palette(weight, bits=4, group_size=16, importance=mean_squares)
    palette.decode()
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_STEPS = 20
_KNOTS = 16
"""Places, for each number of a table, at which the density of the weights is taken."""
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Palette:
    """One weight matrix."""

    indices: Tensor
    """Uint8 (rows, columns), each below the number of a table's entries."""
    tables: Tensor
    """Float16 (groups, entries), rising; a group is rows / groups neighbouring rows."""

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return int(self.tables.shape[1]).bit_length() - 1

    def decode(self) -> Tensor:
        """The weights, float32 (rows, columns)."""
        groups = len(self.tables)
        values = self.tables.float().gather(1, self.indices.view(groups, -1).long())
        return values.view(self.indices.shape)


def fit_palette(
    weight: Tensor, bits: int, group_size: int, importance: Tensor | None = None
) -> Palette:
    """Fit tables of 2**bits numbers to float32 weights (rows, columns) within float16's range.

    `importance` (columns,), not negative, weighs the squared error of each column, as the diagonal
    of the Hessian of the layer's output error does; None weighs all alike. `group_size` divides the
    number of rows.
    """
    rows, columns = weight.shape
    assert rows % group_size == 0, "groups are whole"
    groups = weight.reshape(-1, group_size * columns)
    weights = torch.ones(columns) if importance is None else _positive(importance)
    weights = weights.repeat(group_size)
    step = max(_CHUNK_WEIGHTS // groups.shape[1], 1)
    parts = [_fit(part, weights, 1 << bits) for part in groups.split(step)]
    indices = torch.cat([part[0] for part in parts]).view(rows, columns)
    return Palette(indices, torch.cat([part[1] for part in parts]))


def _positive(importance: Tensor) -> Tensor:
    """Inputs that were always zero count a little: text that was not seen may use them."""
    mean = importance.double().mean()
    if not torch.isfinite(mean) or mean <= 0:
        return torch.ones(len(importance))
    return (importance.double() / mean).clamp(min=1e-4).float()


def _fit(values: Tensor, weights: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Indices, uint8 (groups, n), and tables, float16 (groups, entries), of values (groups, n)."""
    ordered, order = values.sort(dim=1)
    weight = weights[order].double()
    sums = _running(weight), _running(weight * ordered)
    tables = _lloyd(ordered, sums, _starts(ordered, sums[0], entries)).half()
    middles = _middles(tables.float())
    return torch.searchsorted(middles, values).to(torch.uint8), tables


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0 ... n values, float64 (groups, n + 1)."""
    return torch.nn.functional.pad(values.double().cumsum(1), (1, 0))


def _middles(tables: Tensor) -> Tensor:
    return ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()


def _starts(ordered: Tensor, mass: Tensor, entries: int) -> Tensor:
    """Tables, float32, whose density is the cube root of that of the weights."""
    count = min(ordered.shape[1] - 1, _KNOTS * entries)
    knots = torch.linspace(0, ordered.shape[1] - 1, count + 1).round().long()
    values = ordered[:, knots]
    gaps = values.diff(dim=1).double()
    # the integral of density^(1/3) over a gap: (mass / gap)^(1/3) * gap
    reached = _running((mass[:, knots].diff(dim=1) * gaps.square()) ** (1 / 3))
    shares = (torch.arange(entries) + 0.5) / entries
    wanted = (shares * reached[:, -1:]).contiguous()
    places = (torch.searchsorted(reached, wanted) - 1).clamp(0, count - 1)
    begin, length = reached.gather(1, places), gaps.gather(1, places)
    inside = (wanted - begin) / reached.diff(dim=1).gather(1, places).clamp(min=1e-300)
    return (values.gather(1, places) + inside * length).float()


def _lloyd(ordered: Tensor, sums: tuple[Tensor, Tensor], tables: Tensor) -> Tensor:
    """Move the numbers of the tables to the mean of the weights that are nearest to them."""
    before = None
    for _ in range(_MAX_STEPS):
        edges = _edges(ordered, tables)
        if before is not None and torch.equal(edges, before):
            break
        before = edges
        mass, moment = (total.gather(1, edges).diff(dim=1) for total in sums)
        tables = torch.where(mass > 0, moment / mass.clamp(min=1e-300), tables.double()).float()
        tables = tables.sort(dim=1).values
    return tables


def _edges(ordered: Tensor, tables: Tensor) -> Tensor:
    """Where the weights of each number begin in the sorted ones, int64 (groups, entries + 1)."""
    inner = torch.searchsorted(ordered, _middles(tables))
    return torch.nn.functional.pad(
        torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=ordered.shape[1]
    )
