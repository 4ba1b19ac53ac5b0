"""Divergences between a teacher's p and a student's q over buckets, with the slope that gives
every logit gradient.

    forward_kl       KL(p || q)                                        mass-covering; linear in p
    reverse_kl       KL(q || p)                                        mode-seeking
    jsd              b KL(p || m) + (1-b) KL(q || m),  m = b p + (1-b) q      (GKD,
    arXiv:2306.13649, equation 1)
    skew_kl          KL(p || a p + (1-a) q)                            (DistiLLM, arXiv:2402.03898)
    skew_reverse_kl  KL(q || a q + (1-a) p)

b is `jsd_weight`, the weight of the teacher, as beta in TRL's `generalized_jsd_loss`; a is `skew`.
b near 0 behaves like forward KL, b near 1 like reverse KL. At exactly 0 and 1 the formula is 0 for
every pair, so these values are refused.

A bucket is a token or a set of tokens. With s_b = dD/dlog q_b (buckets independent), the gradient
with respect to the logit of token k in bucket B is q_k (s_B / q_B - sum of all s). It is 0 if the
student equals the teacher.
"""

import math

import torch
from torch import Tensor

from xinslm.losses.config import LossConfig


def bucket_divergence(log_p: Tensor, log_q: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Each bucket's contribution to D(p, q) and to dD/dlog q.

    log_p, log_q: (rows, buckets), finite logarithms of distributions. Both results have that shape;
    the contributions of a row sum to its divergence, which is never negative.
    """
    p, q = log_p.exp(), log_q.exp()
    if config.divergence == "forward_kl":
        return p * (log_p - log_q), -p
    if config.divergence == "reverse_kl":
        ratio = log_q - log_p
        return q * ratio, q * (1 + ratio)
    if config.divergence == "jsd":
        share = config.jsd_weight
        log_m = _mixture(log_p, log_q, share)
        return share * p * (log_p - log_m) + (1 - share) * q * (log_q - log_m), (1 - share) * q * (
            log_q - log_m
        )
    if config.divergence == "skew_kl":
        log_m = _mixture(log_p, log_q, config.skew)
        return p * (log_p - log_m), -(1 - config.skew) * q * (log_p - log_m).exp()
    log_m = _mixture(log_q, log_p, config.skew)
    ratio = log_q - log_m
    return q * ratio, q * (1 + ratio - config.skew * ratio.exp())


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Logarithm of share * a + (1 - share) * b."""
    return torch.logaddexp(
        log_a + (math.log(share) if share else -math.inf), log_b + math.log1p(-share)
    )
