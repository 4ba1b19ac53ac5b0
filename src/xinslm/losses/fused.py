"""The fused head: output projection, cross-entropy and distillation in one pass over row chunks.

    loss = (alpha * CE + beta * KD) / normaliser

CE is hard-label cross-entropy. KD is one of five divergences from a teacher: sparse, from a cache
(`SparseTargets`), dense, live (`DenseTargets`), over buckets of tokens (`BucketTargets`), or the
weighted mean of those from several teachers (`MixedTargets`).
Sparse targets are not renormalized: the mass outside the top k is a bucket of its own. At positions
without teacher targets CE has the weight alpha + beta. The logits of a
chunk of positions are one product; those of `PIECE_ROWS` at a time, few enough to stay in the
processor's cache, become their gradient in place, so there is no graph and no second copy. The
gradient of the LM head is summed in float32. A pure function for any training loop:

    states = model.model(input_ids).last_hidden_state
    rows, labels, _ = next_tokens(states, input_ids_with_minus_100)
    loss, metrics = fused_loss(
        rows, model.lm_head.weight, labels, targets, LossConfig(alpha=0.1, beta=0.9)
    )
    loss.backward()

`weight` may be computed (base + adapter, a tied embedding): its gradient flows on. Apply a logit
scale to `hidden`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xinslm.losses.chunk import chunk_loss
from xinslm.losses.config import LossConfig
from xinslm.losses.inplace import widest
from xinslm.losses.memory import HeadMemory
from xinslm.losses.targets import BucketTargets, MixedTargets, Targets

PIECE_ROWS = 64
"""Positions whose logits become their gradient at a time."""
CHUNK_ROWS = 256
"""Default of `HeadOptions.chunk_rows` in float32, where products add to the head's gradient in
place.
"""
NARROW_CHUNK_BYTES = 2**28
"""Logits of a chunk in bfloat16 or float16, where each product is a matrix of its own to add."""
SUM_ROWS = 4096
"""Rows of a narrow product that are added at a time: PyTorch widens them in memory first."""


@dataclass(frozen=True)
class LossMetrics:
    """Sums over the N positions, for reporting: divide by the number of positions."""

    ce: float
    """Hard-label cross-entropy, nats."""
    kd: float
    """Distillation term with its T^2, nats; with tail samples, up to a constant that does not
    depend on the student.
    """


def next_tokens(
    hidden: Tensor, labels: Tensor, ignore: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Pair each position's hidden state with the next token, leaving out pads and prompts.

    hidden: (batch, seq, d). labels: (batch, seq), the input tokens, `ignore` if a token is not a
    target. Returns hidden states (N, d), labels (N,) and places (N,) int64 in the flattened (batch
    * seq) input, to select the teacher targets of these rows. Positions that are left out are never
    read, so they may hold NaN.
    """
    after = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), ignore)), dim=1).reshape(-1)
    places = (after != ignore).nonzero()[:, 0]
    return hidden.reshape(-1, hidden.shape[-1])[places], after[places], places


@dataclass(frozen=True)
class HeadOptions:
    """What an output projection has besides its matrix, and how it is computed."""

    bias: Tensor | None = None
    """(V,); receives a gradient."""
    softcap: float | None = None
    """c of logits c * tanh(x / c), as in Gemma 2."""
    chunk_rows: int | None = None
    """Positions whose logit gradients are kept until they are multiplied; by default 256, and as
    many as take 256 MB if `hidden` is bfloat16 or float16.
    """
    memory: HeadMemory | None = None
    """Kept from one loss to the next; by default the logits' memory is given back."""


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: Targets | None,
    config: LossConfig,
    normaliser: float | None = None,
    head: HeadOptions | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Distillation loss of N positions; gradients for `hidden`, `weight` and the bias are computed
    in the same pass.

    hidden: (N, d), the student's last hidden states, without pads and prompts. weight: (V, d), the
    LM head. labels: (N,) int64, the next tokens. normaliser: divides the sum, by default N; when
    micro-batches are accumulated, the number of positions in the optimizer step. Returns a scalar
    loss (float32, or float64 if hidden is) and the summed terms. Raises ValueError for settings
    that contradict each other or the targets, and on CPU for labels outside the vocabulary.
    """
    if targets is None:
        config = replace(config, alpha=config.alpha + config.beta, beta=0.0)
    if wrong := config.errors():
        raise ValueError("; ".join(wrong))
    parts = targets.parts if isinstance(targets, MixedTargets) else (targets,)
    if config.temperature != 1 and any(isinstance(part, BucketTargets) for part in parts):
        raise ValueError(
            "the teacher's probabilities inside a bucket of tokens are known at temperature 1 "
            "only: set loss.temperature to 1"
        )
    if labels.device.type == "cpu" and bool(((labels < 0) | (labels >= weight.shape[0])).any()):
        raise ValueError(
            f"labels must be ids below {weight.shape[0]}; leave other positions out (`next_tokens`)"
        )
    head = head or HeadOptions()
    count = float(normaliser if normaliser is not None else max(hidden.shape[0], 1))
    bias = head.bias
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    work = _Work(labels, targets, config, count, head)
    loss, sums = _FusedHead.apply(hidden, weight, bias, work)
    ce, kd = sums.tolist()
    return loss, LossMetrics(ce, kd)


@dataclass(frozen=True)
class _Work:
    """The inputs of `_FusedHead` that get no gradient."""

    labels: Tensor
    targets: Targets | None
    config: LossConfig
    count: float
    head: HeadOptions


class _FusedHead(torch.autograd.Function):
    """Computes the gradients while a chunk's logits exist, and returns them in `backward`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        memory = work.head.memory or HeadMemory()
        matrix = weight.detach()  # (V, d)
        if matrix.dtype != hidden.dtype:
            narrow = memory.take("matrix", tuple(matrix.shape), hidden.dtype, matrix.device)
            matrix = narrow.copy_(matrix)
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = _Sum(weight, exact, memory) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        sums = torch.zeros(2, dtype=widest(hidden), device=hidden.device)
        for rows, g in _logit_gradients(hidden, matrix, bias, work, memory, sums, grad_bias):
            if grad_hidden is not None:
                torch.mm(g, matrix, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.add_product(g.t(), hidden[rows])
        alpha, beta = work.config.alpha, work.config.beta
        loss = ((alpha * sums[0] + beta * sums[1]) / work.count).to(exact)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.total().to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError(
                "the fused loss gives its gradients once: compute it again for a "
                "second backward pass"
            )
        grads, ctx.grads = ctx.grads, None
        scale = grad_loss.item()
        for grad in grads:
            if grad is not None and scale != 1.0:
                grad.mul_(scale)
        return *grads, None


def chunk_positions(vocabulary: int, width: int) -> int:
    """Default of `HeadOptions.chunk_rows` for hidden states of `width` bytes a number."""
    return CHUNK_ROWS if width > 2 else max(1, NARROW_CHUNK_BYTES // (vocabulary * width))


class _Sum:
    """A sum of products (V, d) in float32 or float64; narrow ones are rounded before they are
    added.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, memory: HeadMemory) -> None:
        self._total, self._memory = torch.empty_like(like, dtype=dtype), memory
        self._is_empty = True

    def total(self) -> Tensor:
        """The sum, of no products too."""
        return self._total.zero_() if self._is_empty else self._total

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add (V, rows) times (rows, d)."""
        total = self._total
        if left.dtype == total.dtype:
            total.addmm_(left, right, beta=0 if self._is_empty else 1)
        else:
            shape = tuple(total.shape)
            product = self._memory.take("product", shape, left.dtype, total.device)
            torch.mm(left, right, out=product)
            if self._is_empty:
                total.copy_(product)
            else:
                for rows, more in zip(total.split(SUM_ROWS), product.split(SUM_ROWS), strict=True):
                    rows.add_(more)
        self._is_empty = False


def _logit_gradients(
    hidden: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    work: _Work,
    memory: HeadMemory,
    sums: Tensor,
    grad_bias: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of rows and the gradient of their logits, (rows, V) in hidden's dtype, valid
    until the next one.

    Adds the loss terms to `sums` (2,) and the bias's gradient to `grad_bias`.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    is_exact, total = hidden.dtype == exact, hidden.shape[0]
    device, vocabulary = hidden.device, len(matrix)
    chunk = work.head.chunk_rows or chunk_positions(vocabulary, hidden.dtype.itemsize)
    gradients = memory.take("logits", (min(chunk, total), vocabulary), hidden.dtype, device)
    wide = gradients
    if not is_exact:
        wide = memory.take("piece", (PIECE_ROWS, vocabulary), exact, device)
    for start in range(0, total, chunk):
        end = min(start + chunk, total)
        torch.mm(hidden[start:end], matrix.t(), out=gradients[: end - start])
        for at in range(start, end, PIECE_ROWS):
            rows = slice(at, min(at + PIECE_ROWS, end))
            kept = gradients[rows.start - start : rows.stop - start]
            z = kept if is_exact else wide[: len(kept)]  # becomes the gradient
            if not is_exact:
                z.copy_(kept)
            if bias is not None:
                z.add_(bias)
            sums += _piece_(z, rows, work)
            if grad_bias is not None:
                grad_bias += z.sum(dim=0)
            if not is_exact:
                kept.copy_(z)
        yield slice(start, end), gradients[: end - start]


def _piece_(z: Tensor, rows: slice, work: _Work) -> Tensor:
    """Replace logits (rows, V) by their gradient; return the sums of both loss terms, (2,)."""
    slope, softcap = None, work.head.softcap
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(softcap)
    part = None if work.targets is None else work.targets[rows]
    sums = torch.stack(chunk_loss(z, work.labels[rows], part, work.config, 1 / work.count))
    if slope is not None:
        z.mul_(slope)
    return sums
