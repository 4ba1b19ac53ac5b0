"""The losses of distillation in their plain form: full float64 distributions, and autograd.

Slow and large on purpose, and independent of the fused head that it is compared with.
"""

import math

import torch
from torch import Tensor

from xinslm.losses.chunk import LEAST_SPARSE_LOG_P
from xinslm.losses.config import LossConfig
from xinslm.losses.targets import SparseTargets


def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: SparseTargets | None,
    config: LossConfig,
) -> Tensor:
    """Mean of alpha * CE + beta * KD; forward_kl: mode decoupled, up to a constant; others: T=1.

    hidden (N, d), weight (V, d), both float64 with gradients; the result is a float64 scalar.
    """
    log_q = torch.log_softmax(hidden @ weight.T, dim=1)
    ce = -log_q.gather(1, labels[:, None]).mean()
    if targets is None:
        return ce
    rows = [slice(n, n + 1) for n in range(len(labels))]
    each = [_position(log_q[n], int(labels[n]), targets[row], config) for n, row in enumerate(rows)]
    return config.alpha * ce + config.beta * torch.stack(each).mean()


def _position(log_q: Tensor, label: int, target: SparseTargets, config: LossConfig) -> Tensor:
    """KD of one position: over {top-k tokens, tail}, T inside the top k, and the sampled tail."""
    if not bool(target.valid_mask[0]):
        return -log_q[label]
    t, ids, log_p = config.temperature, target.top_k_ids[0], target.top_k_log_probs[0].double()
    outside = torch.ones_like(log_q, dtype=torch.bool)
    outside[ids] = False
    p_top_k, p_tail = log_p.exp().sum(), target.log_tail[0].double().exp()
    log_q_top_k, log_q_tail = log_q[ids].logsumexp(0), log_q[outside].logsumexp(0)
    inside_p, inside_q = torch.log_softmax(log_p / t, 0), torch.log_softmax(log_q[ids] / t, 0)
    if config.divergence != "forward_kl":
        p = torch.cat((log_p.exp(), p_tail[None]))
        q = torch.cat((log_q[ids].exp(), log_q_tail.exp()[None]))
        return _divergence(p.clamp_min(math.exp(LEAST_SPARSE_LOG_P)), q, config)
    split = p_top_k * (p_top_k.log() - log_q_top_k)
    if p_tail > 0:
        split = split + p_tail * (p_tail.log() - log_q_tail)
    inside = t * t * p_top_k * (inside_p.exp() * (inside_p - inside_q)).sum()
    if count := int(target.num_samples[0]):
        drawn = log_q[target.tail_ids[0, :count]].mean()
        return split + inside + config.effective_tail_weight * p_tail * (log_q_tail - drawn)
    # the label replaces samples of the unknown tail
    if bool(target.unknown_tail[0]) and label not in ids.tolist():
        return split + inside + config.effective_tail_weight * (log_q_tail - log_q[label])
    return split + inside


def _divergence(p: Tensor, q: Tensor, config: LossConfig) -> Tensor:
    """Divergence of two distributions over buckets, (buckets,) each, as it is defined."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    w, s = config.jsd_weight, config.skew
    mixed = w * p + (1 - w) * q
    return {
        "reverse_kl": kl(q, p),
        "jsd": w * kl(p, mixed) + (1 - w) * kl(q, mixed),
        "skew_kl": kl(p, s * p + (1 - s) * q),
        "skew_reverse_kl": kl(q, s * q + (1 - s) * p),
    }[config.divergence]
