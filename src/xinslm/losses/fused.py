"""The fused head: output projection, cross-entropy and distillation in one pass over row chunks.

    loss = (alpha * CE + beta * KD) / normaliser

CE is against the token that came, KD against a teacher: sparse, from a cache (`SparseTargets`),
dense, live (`DenseTargets`), or over buckets of tokens (`BucketTargets`).
KD is one of five divergences (`divergences`, `chunk`); nothing is renormalised away, the mass
outside the cached head is always a bucket of its own, and where the teacher says nothing the text
has the whole weight. A chunk's (rows, vocabulary) logits become its gradient in place, so no graph
and no second copy exist; the head's gradient is summed in float32. A pure function, for any
training loop:

    rows, labels, _ = next_tokens(model.model(input_ids).last_hidden_state,
    input_ids_with_minus_100) loss, metrics = fused_loss(rows, model.lm_head.weight, labels,
    targets, LossConfig(alpha=0.1, beta=0.9)) loss.backward()

`weight` may be computed (base + adapter, a tied embedding): its gradient flows on. A logit scale
belongs into `hidden`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xinslm.losses.chunk import chunk_loss
from xinslm.losses.config import LossConfig
from xinslm.losses.inplace import widest
from xinslm.losses.targets import BucketTargets, Targets


@dataclass(frozen=True)
class LossMetrics:
    """Sums over the N positions, for reporting: divide by the number of positions."""

    ce: float
    """Cross-entropy, nats."""
    kd: float
    """Distillation term with its T^2, nats; where tail samples count, up to a constant that no
    student can change.
    """


def next_tokens(
    hidden: Tensor, labels: Tensor, ignore: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Pair each position's hidden state with the token after it, leaving out pads and prompts.

    hidden: (batch, seq, d). labels: (batch, seq), the input tokens, `ignore` where a token is no
    target. Returns hidden states (N, d), labels (N,) and places (N,) int64 in the flattened (batch
    * seq) input: the positions whose teacher targets belong to the rows. What is left out is never
    computed with, so it may hold anything, NaN too.
    """
    after = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), ignore)), dim=1).reshape(-1)
    places = (after != ignore).nonzero()[:, 0]
    return hidden.reshape(-1, hidden.shape[-1])[places], after[places], places


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: Targets | None,
    config: LossConfig,
    normaliser: float | None = None,
    chunk_rows: int = 256,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Distillation loss of N positions, with gradients for `hidden`, `weight` and `bias` computed
    on the way.

    hidden: (N, d), the student's last hidden states, pads and prompts already left out. weight: (V,
    d), its head. labels: (N,) int64, the tokens that came. normaliser: what the sum is divided by,
    by default N; with accumulated micro-batches, the number of positions in the whole optimiser
    step. bias: (V,). softcap: c of logits c * tanh(x / c). Returns a scalar loss (float32, or
    float64 where hidden is) and the summed parts. Raises ValueError for settings that do not fit
    each other or the targets, and on CPU for labels outside the vocabulary.
    """
    if targets is None:
        config = replace(config, alpha=config.alpha + config.beta, beta=0.0)
    if wrong := config.errors():
        raise ValueError("; ".join(wrong))
    if isinstance(targets, BucketTargets) and config.temperature != 1:
        raise ValueError(
            "inside a bucket of tokens the teacher is unknown, at any T but 1: set "
            "loss.temperature to 1"
        )
    if labels.device.type == "cpu" and bool(((labels < 0) | (labels >= weight.shape[0])).any()):
        raise ValueError(
            f"labels must be ids below {weight.shape[0]}; leave other positions out (`next_tokens`)"
        )
    count = float(normaliser if normaliser is not None else max(hidden.shape[0], 1))
    if not torch.is_grad_enabled():
        hidden, weight, bias = (
            hidden.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
        )
    loss, sums = _FusedHead.apply(
        hidden, weight, bias, labels, targets, config, count, chunk_rows, softcap
    )
    ce, kd = sums.tolist()
    return loss, LossMetrics(ce, kd)


class _FusedHead(torch.autograd.Function):
    """Computes the gradients while the logits of a chunk are at hand, and hands them out in
    `backward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        targets: Targets | None,
        config: LossConfig,
        count: float,
        chunk_rows: int,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(hidden.dtype)  # (V, d)
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        sums = torch.zeros(2, dtype=widest(hidden), device=hidden.device)
        total = hidden.shape[0]
        buffer = torch.empty(
            min(chunk_rows, total), weight.shape[0], dtype=exact, device=hidden.device
        )
        for start in range(0, total, chunk_rows):
            rows = slice(start, min(start + chunk_rows, total))
            z = buffer[: rows.stop - rows.start]  # (rows, V); becomes the gradient
            if hidden.dtype == exact:
                torch.mm(hidden[rows], matrix.t(), out=z)
            else:
                z.copy_(torch.mm(hidden[rows], matrix.t()))
            if bias is not None:
                z.add_(bias)
            slope = None
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = 1 - z.square()
                z.mul_(softcap)
            part = None if targets is None else targets[rows]
            sums += torch.stack(chunk_loss(z, labels[rows], part, config, 1 / count))
            if slope is not None:
                z.mul_(slope)
            if grad_bias is not None:
                grad_bias += z.sum(dim=0)
            g = z.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(g, matrix, out=grad_hidden[rows])
            if grad_weight is not None:
                if g.dtype == exact:
                    grad_weight.addmm_(g.t(), hidden[rows])
                else:
                    grad_weight += torch.mm(g.t(), hidden[rows]).to(exact)
        loss = ((config.alpha * sums[0] + config.beta * sums[1]) / count).to(exact)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
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
        return *grads, None, None, None, None, None, None
