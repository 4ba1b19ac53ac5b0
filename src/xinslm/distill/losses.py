"""The fused head: output projection, cross-entropy and distillation in one pass over row chunks.

    loss = (alpha * CE + beta * KD) / normaliser

CE is against the token that came, KD against a teacher: a sparse one from a cache (`SparseTargets`) or a dense one,
live (`DenseTargets`). A chunk's (rows, vocabulary) logits become its gradient in place, so no graph and no second
copy exist; the head's gradient is summed in float32. A pure function: it needs no trainer of ours.

KD from a sparse teacher is the chain rule of the KL divergence over the buckets {each head token, tail} plus an
estimate of the divergence within the tail from n draws. Nothing is renormalised away: with `tail_weight` 1 the
expected gradient is exactly the full-vocabulary one (cf. RS-KD, Anshumann et al. 2025), with 0 the tail is one
bucket. Temperature, with T^2 in value and gradient (Hinton et al. 2015, section 2):

    decoupled   the split head/tail at temperature 1, T inside the head only: exact from the cache
    full        p^(1/T)/Z_T with the cached Z_T, the tempered tail as one bucket

    loss, figures = fused_loss(hidden, model.head_weight, labels, targets, LossConfig(alpha=0.1, beta=0.9))
    loss.backward()
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.distill.loss_config import LossConfig


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's next-token distribution for N positions: h tokens exactly, the rest as mass and n draws."""

    head_ids: Tensor
    """(N, h) int64, distinct in a row."""
    head_log_probs: Tensor
    """(N, h) float32; with `log_tail` they are the logarithm of a distribution."""
    log_tail: Tensor
    """(N,) float32: log of the mass outside the head."""
    tail_ids: Tensor
    """(N, n) int64: tokens drawn from the teacher's tail; each stands for 1/n of the tail's mass."""
    has_draws: Tensor
    """(N,) bool: whether the draws cover the whole tail; where not, the tail is one bucket."""
    log_z: Tensor
    """(N,) float32: log of sum p^(1/T) over the vocabulary at the cache's temperature."""
    valid: Tensor
    """(N,) bool: whether the teacher says anything about this position."""

    def __getitem__(self, rows: Any) -> "SparseTargets":
        return SparseTargets(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def to(self, device: torch.device | str) -> "SparseTargets":
        """Move all tensors to `device`."""
        return SparseTargets(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class DenseTargets:
    """A live teacher: `logits(rows)` gives its (rows, vocabulary) logits for a slice of the N positions."""

    logits: Callable[[slice], Tensor]


Targets = SparseTargets | DenseTargets


@dataclass(frozen=True)
class LossFigures:
    """Sums over the N positions, for reporting: divide by the number of positions."""

    ce: float
    """Cross-entropy, nats."""
    kd: float
    """Distillation term with its T^2, nats; from a sparse teacher, up to a constant that no student can change."""


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: Targets | None,
    config: LossConfig,
    normaliser: float | None = None,
    chunk_rows: int = 256,
) -> tuple[Tensor, LossFigures]:
    """Distillation loss of N positions, with gradients for `hidden` and `weight` computed on the way.

    hidden: (N, d), the student's last hidden states, pads and prompts already left out. weight: (V, d), its head.
    labels: (N,) int64, the tokens that came. normaliser: what the sum is divided by, by default N; with accumulated
    micro-batches, the number of positions in the whole optimiser step. Returns a scalar float32 loss and the
    summed parts. Raises ValueError for `full` temperature with a positive tail weight.
    """
    if targets is None:
        config = replace(config, alpha=config.alpha + config.beta, beta=0.0)
    if isinstance(targets, SparseTargets) and config.temperature_mode == "full" and config.tail_weight:
        raise ValueError("full temperature has no draws to estimate the tail from: set tail_weight to 0")
    count = float(normaliser if normaliser is not None else hidden.shape[0])
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    loss, sums = _FusedHead.apply(hidden, weight, labels, targets, config, count, chunk_rows)
    ce, kd = sums.tolist()
    return loss, LossFigures(ce, kd)


class _FusedHead(torch.autograd.Function):
    """Computes the gradients while the logits of a chunk are at hand, and hands them out in `backward`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, targets: Targets | None, config: LossConfig,
        count: float, chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(hidden.dtype)  # (V, d)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        sums = torch.zeros(2, dtype=_widest(hidden), device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, min(start + chunk_rows, hidden.shape[0]))
            z = F.linear(hidden[rows], matrix).float()  # (rows, V); becomes the gradient
            sums += torch.stack(chunk_loss(z, labels[rows], _slice(targets, rows), config))
            if wants_hidden or wants_weight:
                g = z.div_(count).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(g, matrix, out=grad_hidden[rows])
                if grad_weight is not None:
                    if g.dtype == torch.float32:
                        grad_weight.addmm_(g.t(), hidden[rows])
                    else:
                        grad_weight += torch.mm(g.t(), hidden[rows]).float()
        loss = ((config.alpha * sums[0] + config.beta * sums[1]) / count).float()
        ctx.grads = (grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        scale = grad_loss.item()
        for grad in (grad_hidden, grad_weight):
            if grad is not None and scale != 1.0:
                grad.mul_(scale)
        return grad_hidden, grad_weight, None, None, None, None, None


def _slice(targets: Targets | None, rows: slice) -> SparseTargets | Tensor | None:
    if isinstance(targets, DenseTargets):
        return targets.logits(rows)
    return None if targets is None else targets[rows]


def chunk_loss(
    z: Tensor, labels: Tensor, targets: SparseTargets | Tensor | None, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Turn logits `z` (rows, V) float32 into the gradient of alpha*CE + beta*KD, in place; return both sums in nats.

    A Tensor as `targets` is a dense teacher's logits of the same shape.
    """
    if targets is None or config.beta == 0.0:
        return _cross_entropy(z, labels, config.alpha), z.new_zeros((), dtype=_widest(z))
    if isinstance(targets, Tensor):
        return _dense(z, labels, targets, config)
    if config.temperature_mode == "full" and config.temperature != 1.0:
        return _sparse_full(z, labels, targets, config)
    return _sparse_decoupled(z, labels, targets, config)


def _widest(x: Tensor) -> torch.dtype:
    """Type for sums: float64, which Apple's GPUs do not have."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _softmax_(z: Tensor) -> Tensor:
    """Replace logits by probabilities; return the log-normaliser (rows, 1)."""
    top = z.amax(dim=1, keepdim=True)
    total = z.sub_(top).exp_().sum(dim=1, keepdim=True)
    z.div_(total)
    return top + total.log()


def _add_at(g: Tensor, ids: Tensor, values: Tensor) -> None:
    """g[row, ids[row, j]] += values[row, j], repeated ids adding up."""
    g.scatter_add_(1, ids, values)


def _cross_entropy(z: Tensor, labels: Tensor, alpha: float) -> Tensor:
    at_label = z.gather(1, labels[:, None])
    ce = _softmax_(z) - at_label
    z.mul_(alpha)
    _add_at(z, labels[:, None], torch.full_like(at_label, -alpha))
    return ce.sum(dtype=_widest(z))


def _dense(z: Tensor, labels: Tensor, teacher: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Exact KL(p^T || q^T) over the whole vocabulary; gradient beta * T * (q^T - p^T)."""
    t = config.temperature
    if teacher.shape[1] < z.shape[1]:  # rows that no token has
        teacher = F.pad(teacher, (0, z.shape[1] - teacher.shape[1]), value=-1e30)
    log_p = torch.log_softmax(teacher.float() / t, dim=1)
    log_q = torch.log_softmax(z / t, dim=1)
    kd = t * t * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dtype=_widest(z))
    ce = _cross_entropy(z, labels, config.alpha)
    z.add_(log_q.exp_().sub_(log_p.exp_()), alpha=config.beta * t)
    return ce, kd


def _sparse_decoupled(z: Tensor, labels: Tensor, s: SparseTargets, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Chain-rule KD, at temperature 1 but inside the head; `tail_weight` is the lambda of the module's text.

    With q the student, P = head mass, R = tail mass of the teacher, P_q and Q those of the student, c_k the draws:
    in the head    q_k (1 - P/P_q) + P T (q~_k - p~_k)        (~: renormalised in the head at temperature T)
    in the tail    q_k (1 - (1 - lambda) R/Q) - lambda R/n c_k
    """
    t, alpha = config.temperature, config.alpha
    beta = config.beta * s.valid[:, None].float()
    at_label, at_head, at_draws = (
        z.gather(1, labels[:, None]),
        z.gather(1, s.head_ids),
        z.gather(1, s.tail_ids),
    )
    log_total = _softmax_(z)
    q_head = z.gather(1, s.head_ids)
    z.scatter_(1, s.head_ids, 0.0)
    q_tail = z.sum(dim=1, keepdim=True).clamp_min(
        torch.finfo(torch.float32).tiny
    )  # summed, not 1 - head: no cancellation
    p, log_p = s.head_log_probs.exp(), s.head_log_probs
    tail, head_mass = s.log_tail.exp()[:, None], p.sum(dim=1, keepdim=True)
    q_mass = q_head.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    draws = at_draws.shape[1]
    lam = (config.tail_weight if draws else 0.0) * s.has_draws[:, None].float()

    log_p_in, log_q_in = torch.log_softmax(log_p / t, dim=1), torch.log_softmax(at_head / t, dim=1)
    inside = (log_p_in.exp() * (log_p_in - log_q_in)).sum(dim=1, keepdim=True)
    split = _part(head_mass, q_mass) + _part(tail, q_tail)
    within_tail = (
        lam * tail * (q_tail.log() - (at_draws - log_total).mean(dim=1, keepdim=True)) if draws else 0.0 * tail
    )
    kd = s.valid[:, None] * (split + head_mass * t * t * inside + within_tail)

    z.mul_(alpha + beta * (1 - (1 - lam) * tail / q_tail))
    head_grad = q_head * (1 - head_mass / q_mass) + head_mass * t * (log_q_in.exp() - log_p_in.exp())
    z.scatter_(1, s.head_ids, alpha * q_head + beta * head_grad)
    if draws:
        _add_at(z, s.tail_ids, (-beta * lam * tail / draws).expand(-1, draws))
    _add_at(z, labels[:, None], torch.full_like(at_label, -alpha))
    return (log_total - at_label).sum(dtype=_widest(z)), kd.sum(dtype=_widest(z))


def _sparse_full(z: Tensor, labels: Tensor, s: SparseTargets, config: LossConfig) -> tuple[Tensor, Tensor]:
    """KD over the buckets {head tokens, tail}, both sides tempered; the teacher's come from the cached Z_T."""
    t = config.temperature
    beta = config.beta * t * s.valid[:, None].float()
    q = z / t
    log_total = _softmax_(q)
    q_head = q.gather(1, s.head_ids)
    log_q_head = z.gather(1, s.head_ids) / t - log_total
    q.scatter_(1, s.head_ids, 0.0)
    q_tail = q.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    log_p = s.head_log_probs / t - s.log_z[:, None]
    p = log_p.exp()
    tail = (1 - p.sum(dim=1, keepdim=True)).clamp_min(0.0)
    kd = s.valid[:, None] * ((p * (log_p - log_q_head)).sum(dim=1, keepdim=True) + _part(tail, q_tail))
    q.mul_(1 - tail / q_tail)
    q.scatter_(1, s.head_ids, q_head - p)
    ce = _cross_entropy(z, labels, config.alpha)
    z.add_(q.mul_(beta))
    return ce, t * t * kd.sum(dtype=_widest(z))


def _part(p: Tensor, q: Tensor) -> Tensor:
    """One bucket's p log(p/q), 0 where p is 0."""
    return torch.xlogy(p, p) - p * q.log()
