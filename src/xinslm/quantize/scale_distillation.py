"""Train the scales of a quantized model against the full-precision model; its codes stay.

The loss is the KL divergence of the quantized model's next-token distributions from those of the
original, over all positions of the calibration rows, and the trained numbers are one relative
change for each scale: what distilled weight quantization (DWQ) of mlx-lm does. A scale is rounded
to what is stored in every forward pass and gets its gradient as if it were not (the
straight-through estimator, arXiv:1308.3432), so the measured loss is that of the stored model.

An eighth of the rows is not trained on. If the divergence there does not fall, the scales are left
as they were.

    tuned = distill_scales(source, quantized, batches, steps=100)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from xinslm.data.packing import Batch
from xinslm.heap import HeapKeeper
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import fused_loss
from xinslm.losses.targets import DenseTargets
from xinslm.model.grids import BLOCK, GRIDS, decode, storable
from xinslm.model.param_dtype import Linear, forget_copies
from xinslm.model.quantized import QuantizedSource
from xinslm.model.source import ModelSource
from xinslm.model.transformer import Transformer
from xinslm.precision import compute_dtype
from xinslm.progress import Listener, Progress, ignore
from xinslm.quantize.rows import hidden_states, require_finite, single_rows

LEARNING_RATE = 1e-3
"""Largest relative change of a scale in one step."""
HELD_OUT = 8
"""One row in this many is measured and not trained on."""
_KL = LossConfig(alpha=0.0, beta=1.0)
_STAGE = "train scales"


@dataclass(frozen=True)
class TunedScales:
    """Scales after training, and what it brought on the rows that were not trained on."""

    scales: dict[str, Tensor]
    """Float16 (rows, columns / 32) by weight name without '.weight'; empty if nothing improved."""
    before: float
    """KL divergence from the original with the given scales, nats per token."""
    after: float
    """The same with the trained scales."""
    tokens: int
    """Positions that both were measured on."""


class _Scales:
    """A linear layer whose weight follows from fixed codes and a relative change of each scale."""

    def __init__(self, module: Linear, codes: Tensor, scales: Tensor) -> None:
        self.module, self.codes, self.scales = module, codes, scales
        self.change = torch.zeros_like(scales)
        """What is trained, (rows, columns / 32)."""
        self.module.weight.requires_grad_(True)
        self.module.weight.register_post_accumulate_grad_hook(self._take)

    def stored(self) -> Tensor:
        """The scales as they are stored, float32."""
        return storable(self.scales * self.change.exp())

    @torch.no_grad()
    def decode(self) -> None:
        """Write the weight that codes and scales stand for."""
        self.module.weight.data = decode(self.codes, self.stored())

    def _take(self, weight: Tensor) -> None:
        """Turn the weight's gradient into that of the change, and free it."""
        assert weight.grad is not None, "the hook comes after the gradient"
        by_code = weight.grad.unflatten(-1, (-1, BLOCK)).mul_(self.codes.unflatten(-1, (-1, BLOCK)))
        grad = by_code.sum(-1).mul_(self.stored())
        self.change.grad = grad if self.change.grad is None else self.change.grad.add_(grad)
        weight.grad = None


def distill_scales(
    source: ModelSource,
    quantized: QuantizedSource,
    batches: list[Batch],
    steps: int,
    on_progress: Listener = ignore,
) -> TunedScales:
    """Train the scales of the linear layers for `steps` steps of AdamW.

    A step takes one batch of `batches`, in turn; the rate falls to 0 along a cosine. Steps compute
    in bfloat16 where the processor multiplies that faster, the divergences in float32. One model is
    in memory at a time, in float32, and the original's last hidden states of all rows, of which
    there must be at least `HELD_OUT`.
    """
    train, held_out = _split(batches)
    on_progress(Progress(_STAGE, 0, steps, "steps"))
    teacher = source.transformer()
    head = teacher.head_weight.detach()
    with torch.no_grad():
        learned = [hidden_states(teacher, row) for row in train]
        measured = [hidden_states(teacher, row) for row in held_out]
    del teacher
    model = quantized.transformer().requires_grad_(False).train()
    trained = _trained(model, quantized)
    pairs = list(zip(held_out, measured, strict=True))
    before = _divergence(model, head, pairs)
    require_finite(source, torch.tensor(before), "--scale-steps")
    changes = [layer.change for layer in trained.values()]
    optimizer = torch.optim.Adam(changes, lr=LEARNING_RATE, betas=(0.9, 0.95))
    rows = _batches(len(train), max(len(batches[0].input_ids), 1))
    model.compute_dtype = compute_dtype("auto", torch.device("cpu"))
    heap = HeapKeeper()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = next(rows)
        count = sum(len(learned[row]) for row in chosen)
        for row in chosen:
            _loss(model, head, train[row], learned[row], count).backward()
        optimizer.step()
        optimizer.zero_grad()
        _decode(model, trained)
        heap.after_step()
        on_progress(Progress(_STAGE, step + 1, steps, "steps"))
    model.compute_dtype = None
    after = _divergence(model, head, pairs)
    tokens = sum(map(len, measured))
    if not after < before:
        return TunedScales({}, before, after, tokens)
    scales = {stem: layer.stored().half() for stem, layer in trained.items()}
    return TunedScales(scales, before, after, tokens)


def _decode(model: Transformer, trained: dict[str, _Scales]) -> None:
    for layer in trained.values():
        layer.decode()
    forget_copies(model)


def _split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Single rows to train on, and every eighth to measure on."""
    rows = single_rows(batches)
    held_out = rows[HELD_OUT - 1 :: HELD_OUT]
    return [row for i, row in enumerate(rows) if i % HELD_OUT != HELD_OUT - 1], held_out


def _batches(count: int, size: int) -> Iterator[list[int]]:
    """Numbers of rows, `size` at a time, around without end."""
    start = 0
    while True:
        yield [(start + i) % count for i in range(min(size, count))]
        start = (start + size) % count


def _loss(
    model: Transformer, head: Tensor, row: Batch, teacher: Tensor, normaliser: float
) -> Tensor:
    """KL divergence from the original whose hidden states `teacher` are, over `normaliser`."""
    labels = torch.zeros(len(teacher), dtype=torch.int64)  # without a weight in this loss
    targets = DenseTargets(lambda rows: teacher[rows] @ head.T)
    loss, _ = fused_loss(
        hidden_states(model, row), model.head_weight.detach(), labels, targets, _KL, normaliser
    )
    return loss


@torch.no_grad()
def _divergence(model: Transformer, head: Tensor, pairs: list[tuple[Batch, Tensor]]) -> float:
    """KL divergence from the original, nats per token."""
    count = sum(len(teacher) for _, teacher in pairs)
    return sum(float(_loss(model, head, row, teacher, count)) for row, teacher in pairs)


def _trained(model: Transformer, quantized: QuantizedSource) -> dict[str, _Scales]:
    """The quantized linear layers of the blocks by name."""
    trained: dict[str, _Scales] = {}
    for name, kind in quantized.formats.items():
        stem = name.removesuffix(".weight")
        if kind not in GRIDS or not stem.startswith("model.layers."):
            continue
        weight = quantized.stored(name)
        assert weight.scales is not None, "a weight with codes has scales"
        module = cast(Linear, model.get_submodule(stem))
        trained[stem] = _Scales(module, weight.codes(), weight.scales.float())
    return trained
