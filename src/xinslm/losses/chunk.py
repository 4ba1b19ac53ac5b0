"""Loss and logit gradient of one chunk of rows, the gradient written over the logits.

Only one softmax in place, one sum over the tail and one multiplication pass over (rows,
vocabulary); everything else works on the h + n + 1 ids per row that the targets name. Every
divergence from a sparse teacher is over the buckets {each top-k token, tail} (`divergences`).
Forward KL adds a term for the distribution inside the tail, with R and Q the tail mass of teacher
and student:

    R [log Q - mean of log q_j over the tail samples]

It is never negative and makes the expected gradient that of the full vocabulary. If the
distribution inside the tail is unknown (another tokenizer, an endpoint's few log-probabilities),
the label is the only sample: log Q - log q_label, if the label is in the tail. Temperature (Hinton
et al. 2015, arXiv:1503.02531) with T^2 in value and gradient; `decoupled` is the chain rule with T
inside the top k only.

At uncovered positions KD is the hard-label cross-entropy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.losses.buckets import bucket_loss
from xinslm.losses.config import LossConfig
from xinslm.losses.divergences import bucket_divergence
from xinslm.losses.inplace import add_at_labels_, softmax_, widest
from xinslm.losses.targets import BucketTargets, MixedTargets, SparseTargets

LEAST_LOG_P = -100.0
"""Floor of a dense teacher's log-probabilities, so that reversed divergences stay finite."""
LEAST_SPARSE_LOG_P = -20.0
"""Floor for a sparse teacher, whose tail can round to 0; the least that a cache stores."""
DENSE_ROWS = 32
"""Rows of a dense teacher compared at a time, to keep temporaries small."""


def chunk_loss(
    z: Tensor,
    labels: Tensor,
    targets: SparseTargets | BucketTargets | MixedTargets | Tensor | None,
    config: LossConfig,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Turn logits `z` (rows, V) into the gradient of scale * (alpha*CE + beta*KD), in place; return
    both sums in nats.

    labels: (rows,) int64. A Tensor as `targets` is a dense teacher's logits.
    """
    if targets is None or config.beta == 0.0:
        ce = _cross_entropy(z, labels, config.alpha * scale)
        return ce.sum(dtype=widest(z)), z.new_zeros((), dtype=widest(z))
    ce, kd = _row_losses(z, labels, targets, config, scale)
    return ce.sum(dtype=widest(z)), kd.sum(dtype=widest(z))


def _row_losses(
    z: Tensor,
    labels: Tensor,
    targets: SparseTargets | BucketTargets | MixedTargets | Tensor,
    config: LossConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Turn logits into the gradient in place; return CE and KD of each row, (rows,), in nats."""
    if isinstance(targets, MixedTargets):
        return _mixed(z, labels, targets, config, scale)
    if isinstance(targets, BucketTargets):
        return bucket_loss(z, labels, targets, config, scale)
    if isinstance(targets, Tensor):
        parts = [slice(at, at + DENSE_ROWS) for at in range(0, len(z), DENSE_ROWS)]
        rows = [_dense(z[part], labels[part], targets[part], config, scale) for part in parts]
        ce, kd = zip(*rows, strict=True)
        return torch.cat(ce), torch.cat(kd)
    if config.temperature_mode == "full" and config.temperature != 1.0:
        return _sparse_full(z, labels, targets, config, scale)
    return _sparse(z, labels, targets, config, scale)


def _mixed(
    z: Tensor, labels: Tensor, s: MixedTargets, config: LossConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Weighted mean of the losses from several teachers' targets, and of their gradients.

    CE is the same in each part, and the weights sum to 1.
    """
    gradient = torch.zeros_like(z)
    ce = kd = z.new_zeros(len(z), dtype=widest(z))
    for number, part in enumerate(s.parts):
        own = z.clone()
        weight = s.weights[:, number].to(z.dtype)
        ce, of_part = _row_losses(own, labels, part, config, scale)
        gradient.addcmul_(own, weight[:, None])
        kd = kd + weight * of_part
    z.copy_(gradient)
    return ce, kd


def _take(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Set the probabilities (rows, h) at `ids` in z to 0; return them and the sum of the others
    (rows, 1).

    The others are summed instead of computing 1 - taken, which would cancel when the taken tokens
    have nearly all the mass.
    """
    taken = z.gather(1, ids)
    z.scatter_(1, ids, 0.0)
    return taken, z.sum(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)


def _cross_entropy(z: Tensor, labels: Tensor, alpha: Tensor | float) -> Tensor:
    """Hard-label cross-entropy of each row, (rows, 1); `alpha`, a number or (rows, 1), scales the
    gradient.
    """
    at_label = z.gather(1, labels[:, None])
    ce = softmax_(z) - at_label
    z.mul_(alpha)
    add_at_labels_(z, labels, -alpha)
    return ce


def _dense(
    z: Tensor, labels: Tensor, teacher: Tensor, config: LossConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """D(p^T, q^T) over the full vocabulary, each token a bucket."""
    t, alpha = config.temperature, config.alpha * scale
    missing = z.shape[1] - teacher.shape[1]
    teacher = (
        F.pad(teacher, (0, missing), value=-torch.inf) if missing > 0 else teacher[:, : z.shape[1]]
    )
    log_p = torch.log_softmax(teacher.to(z.dtype) / t, dim=1).clamp_min_(LEAST_LOG_P)
    if config.divergence == "forward_kl":
        return _dense_forward(z, labels, log_p, config, scale)
    log_q = torch.log_softmax(z / t, dim=1)
    values, slopes = bucket_divergence(log_p, log_q, config)
    ce = _cross_entropy(z, labels, alpha)
    slopes.sub_(log_q.exp_().mul_(slopes.sum(dim=1, keepdim=True)))
    z.add_(slopes, alpha=config.beta * t * scale)
    return ce[:, 0], t * t * values.sum(dim=1)


def _dense_forward(
    z: Tensor, labels: Tensor, log_p: Tensor, config: LossConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Forward KL with half as many (rows, V) blocks: its gradient needs only p and q."""
    t, alpha, beta = (
        config.temperature,
        config.alpha * scale,
        config.beta * config.temperature * scale,
    )
    at_label = z.gather(1, labels[:, None])
    p = log_p.exp()
    # Before z turns into probabilities. A dot product would lose the tail's many small terms, and p
    # sums to 1 within 1e-5 only, which the normaliser of q, about 30, would multiply.
    kd = log_p.sub_(z, alpha=1 / t).mul_(p).sum(dim=1, keepdim=True)
    mass = p.sum(dim=1, keepdim=True)
    if t == 1.0:
        log_total = softmax_(z)
        kd += log_total * mass
        z.mul_(alpha + beta)
    else:
        q = z / t
        kd += softmax_(q) * mass
        log_total = softmax_(z)
        z.mul_(alpha).add_(q, alpha=beta)
    z.sub_(p, alpha=beta)
    add_at_labels_(z, labels, -alpha)
    return (log_total - at_label)[:, 0], t * t * kd[:, 0]


def _sparse(
    z: Tensor, labels: Tensor, s: SparseTargets, config: LossConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """KD over top k and tail at temperature 1: forward KL with tail samples, or with T inside the
    top k.

    In the tail the gradient of each logit is q_k times one factor per row, plus the contribution of
    the tail samples at their ids.
    """
    covered = s.valid_mask[:, None].to(z.dtype)
    beta = (config.beta * scale) * covered
    alpha = (config.alpha + config.beta) * scale - beta
    at_label, at_top_k, at_samples = (
        z.gather(1, labels[:, None]),
        z.gather(1, s.top_k_ids),
        z.gather(1, s.tail_ids),
    )
    log_total = softmax_(z)
    q_top_k, q_tail = _take(z, s.top_k_ids)
    log_p = (
        torch.cat((s.top_k_log_probs, s.log_tail[:, None]), dim=1)
        .to(z.dtype)
        .clamp_min(LEAST_SPARSE_LOG_P)
    )
    log_q_tail = q_tail.log()
    if config.temperature == 1.0:
        log_q = torch.cat((at_top_k - log_total, log_q_tail), dim=1)
        values, slopes = bucket_divergence(log_p, log_q, config)
        all_slopes = slopes.sum(dim=1, keepdim=True)
        tail_factor = slopes[:, -1:] / q_tail - all_slopes
        top_k_grad = slopes[:, :-1] - q_top_k * all_slopes
        kd = values.sum(dim=1, keepdim=True)
    else:
        kd, top_k_grad, tail_factor = _decoupled(
            at_top_k, q_top_k, q_tail, log_p, config.temperature
        )
    ce = log_total - at_label
    lam = config.effective_tail_weight
    label_weight = lam * (
        s.unknown_tail[:, None] & (s.top_k_ids != labels[:, None]).all(dim=1, keepdim=True)
    ).to(z.dtype)
    kd = kd + label_weight * (log_q_tail + ce)
    tail_factor = tail_factor + label_weight / q_tail
    samples = lam * _sample_weights(s).to(z.dtype)  # (rows, n)
    if samples.shape[1] and lam:
        sampled = samples.sum(dim=1, keepdim=True)
        kd = kd + sampled * log_q_tail - (samples * (at_samples - log_total)).sum(1, keepdim=True)
        tail_factor = tail_factor + sampled / q_tail
    z.mul_(alpha + beta * tail_factor)
    z.scatter_(1, s.top_k_ids, alpha * q_top_k + beta * top_k_grad)
    if samples.shape[1] and lam:
        z.scatter_add_(1, s.tail_ids, -beta * samples)
    add_at_labels_(z, labels, -alpha - beta * label_weight)
    return ce[:, 0], torch.where(s.valid_mask, kd[:, 0], ce[:, 0])


def _sample_weights(s: SparseTargets) -> Tensor:
    """Mass that each tail sample stands for, (rows, n) float32; 0 for those that do not count."""
    counted = torch.arange(s.tail_ids.shape[1], device=s.tail_ids.device) < s.num_samples[:, None]
    return counted * (s.log_tail.exp() / s.num_samples.clamp_min(1))[:, None]


def _decoupled(
    at_top_k: Tensor, q_top_k: Tensor, q_tail: Tensor, log_p: Tensor, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward KL split into top k and tail at temperature 1, with T inside the top k: value,
    gradient in the top k, tail factor.

    P and P_q are the mass of the top k for teacher and student; ~ is renormalised in the top k at
    temperature T. The gradient in the top k is q_k (1 - P/P_q) + P T (q~_k - p~_k), the tail's
    factor 1 - R/Q.
    """
    p = log_p.exp()
    mass, tail = p[:, :-1].sum(dim=1, keepdim=True), p[:, -1:]
    q_mass = q_top_k.sum(dim=1, keepdim=True).clamp_min(torch.finfo(q_top_k.dtype).tiny)
    log_p_in, log_q_in = (
        torch.log_softmax(log_p[:, :-1] / t, dim=1),
        torch.log_softmax(at_top_k / t, dim=1),
    )
    inside = (log_p_in.exp() * (log_p_in - log_q_in)).sum(dim=1, keepdim=True)
    split = mass * (mass / q_mass).log() + tail * (log_p[:, -1:] - q_tail.log())
    top_k_grad = q_top_k * (1 - mass / q_mass) + mass * t * (log_q_in.exp() - log_p_in.exp())
    return split + mass * t * t * inside, top_k_grad, 1 - tail / q_tail


def _sparse_full(
    z: Tensor, labels: Tensor, s: SparseTargets, config: LossConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """KD over the buckets {top-k tokens, tail} with both sides at T; the teacher's values use the
    cached Z_T.
    """
    t = config.temperature
    covered = s.valid_mask[:, None].to(z.dtype)
    q = z / t
    at_top_k = q.gather(1, s.top_k_ids)
    log_total = softmax_(q)
    q_top_k, q_tail = _take(q, s.top_k_ids)
    log_p_top_k = s.top_k_log_probs.to(z.dtype) / t - s.log_z[:, None]
    tail = (1 - log_p_top_k.exp().sum(dim=1, keepdim=True)).clamp_min(torch.finfo(z.dtype).tiny)
    log_p = torch.cat((log_p_top_k, tail.log()), dim=1).clamp_min(LEAST_SPARSE_LOG_P)
    values, slopes = bucket_divergence(
        log_p, torch.cat((at_top_k - log_total, q_tail.log()), dim=1), config
    )
    all_slopes = slopes.sum(dim=1, keepdim=True)
    q.mul_(slopes[:, -1:] / q_tail - all_slopes)
    q.scatter_(1, s.top_k_ids, slopes[:, :-1] - q_top_k * all_slopes)
    ce = _cross_entropy(z, labels, (config.alpha + config.beta * (1 - covered)) * scale)
    z.add_(q.mul_(config.beta * t * scale * covered))
    return ce[:, 0], torch.where(s.valid_mask, t * t * values.sum(dim=1), ce[:, 0])
