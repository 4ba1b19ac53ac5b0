"""How the student reads rows: packing, pads and accumulation must change nothing."""

import numpy as np
import torch
from torch import Tensor

from xinslm.data.packing import Batch
from xinslm.doctor.checks import Examination, Skipped, require
from xinslm.doctor.losses import REPORT, relative
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import fused_loss
from xinslm.model.transformer import Transformer

TOLERANCE = 1e-3
LIMIT = f"at most {TOLERANCE:g}"
PADS = 7


def hidden_states(model: Transformer, batch: Batch) -> Tensor:
    """(rows, length, hidden) of packed rows."""
    device = model.head_weight.device
    ids, positions, segments = (
        torch.from_numpy(array).to(device)
        for array in (batch.input_ids, batch.positions, batch.segments)
    )
    states: Tensor = model.hidden(ids, positions, segments)
    return states


def check_rows(examination: Examination, model: Transformer, batch: Batch) -> None:
    """Check packing against single documents, appended pads, and gradients by micro-batches."""
    with torch.no_grad():
        packed = hidden_states(model, batch)
    examination.make("packing", lambda: _packing(model, batch, packed))
    examination.make("pads", lambda: _pads(model, batch, packed))
    examination.make("accumulation", lambda: _accumulation(model, batch))


@torch.no_grad()
def _packing(model: Transformer, batch: Batch, packed: Tensor) -> str:
    """Logits of a sequence in a packed row are those it has alone."""
    worst, count = 0.0, 0
    shared = np.flatnonzero(batch.segments.max(axis=1) > 0)[:2]
    for row in shared.tolist():
        last = int(batch.segments[row].max())
        for segment in {0, last, last // 2}:
            inside = batch.segments[row] == segment
            ids = torch.from_numpy(batch.input_ids[row][inside])
            alone = model.hidden(ids[None].to(packed.device))[0]
            together = packed[row, torch.from_numpy(inside).to(packed.device)]
            worst = max(worst, relative(model.logits(together), model.logits(alone)))
            count += 1
    if not len(shared):
        raise Skipped("no row holds more than one document")
    detail = f"logits in packed rows differ from {count} documents alone by {worst:.1e} ({LIMIT})"
    return require(worst <= TOLERANCE, detail, REPORT)


def _widened(batch: Batch) -> Batch:
    """The batch with pads after each row, full of ids that must not matter."""

    def wider(array: np.ndarray, value: int) -> np.ndarray:
        return np.concatenate((array, np.full((len(array), PADS), value)), axis=1)

    return Batch(
        wider(batch.input_ids, 1),
        wider(batch.labels, -100),
        wider(batch.positions, 0),
        wider(batch.segments, -1),
        wider(batch.stream, -1),
    )


@torch.no_grad()
def _pads(model: Transformer, batch: Batch, packed: Tensor) -> str:
    """Pads after a row change neither its hidden states nor its loss."""
    wide = _widened(batch)
    states = hidden_states(model, wide)
    real = torch.from_numpy(batch.segments >= 0).to(packed.device)
    off = relative(states[:, : packed.shape[1]][real], packed[real])
    pairs = (packed, batch), (states, wide)
    losses = [_loss(model, hidden, rows, 1.0).item() for hidden, rows in pairs]
    change = abs(losses[1] / losses[0] - 1) if losses[0] else float("inf")
    detail = f"{PADS} more pads change states by {off:.1e}, the loss by {change:.1e} ({LIMIT})"
    return require(off <= TOLERANCE and change <= TOLERANCE, detail, REPORT)


def _loss(model: Transformer, hidden: Tensor, batch: Batch, normaliser: float) -> Tensor:
    labels = torch.from_numpy(batch.labels).to(hidden.device).reshape(-1)
    chosen = labels >= 0
    rows = hidden.reshape(-1, hidden.shape[-1])[chosen]
    config = LossConfig(alpha=1.0, beta=0.0)
    return fused_loss(rows, model.head_weight, labels[chosen], None, config, normaliser)[0]


def _accumulation(model: Transformer, batch: Batch) -> str:
    """The gradient of a step is the same in 1, 2 and 4 micro-batches of unequal size."""
    count = float((batch.labels >= 0).sum())
    block = dict(model.model.layers[0].named_parameters())
    wanted = [model.head_weight, *block.values()]
    before = [weight.requires_grad for weight in model.parameters()]
    model.requires_grad_(False)
    for weight in wanted:
        weight.requires_grad_(True)
    try:
        each = [_gradient(model, batch, parts, count, wanted) for parts in (1, 2, 4)]
    finally:
        for weight, flag in zip(model.parameters(), before, strict=True):
            weight.requires_grad_(flag)
    of_half, of_quarter = _worst(each[1], each[0]), _worst(each[2], each[0])
    detail = f"gradient differs by {of_half:.1e} in 2 parts, {of_quarter:.1e} in 4 ({LIMIT})"
    return require(max(of_half, of_quarter) <= TOLERANCE, detail, REPORT)


def _worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))


def _gradient(
    model: Transformer, batch: Batch, parts: int, count: float, wanted: list[Tensor]
) -> list[Tensor]:
    """Summed gradients of `wanted` over micro-batches."""
    total = [torch.zeros_like(weight) for weight in wanted]
    for rows in np.array_split(np.arange(len(batch.input_ids)), parts):
        part = Batch(*(getattr(batch, name)[rows] for name in batch.__dataclass_fields__))
        if not (part.labels >= 0).any():
            continue
        loss = _loss(model, hidden_states(model, part), part, count)
        for sum_, grad in zip(total, torch.autograd.grad(loss, wanted), strict=True):
            sum_ += grad
    return total
