"""The loss over buckets of tokens that begin with the same bytes, for teachers with another
tokenizer.

A token is a sequence of pieces, so the divergence follows from the chain rule:

    KL(p || q) = KL_0 + E_p [ KL_1 given the first piece + E [ KL_2 ... ] ]

The teacher's probabilities along the text give KL_j for the text's own prefix, and the text is a
sample of the expectation. So the sum over levels, not weighted by the likelihood of the prefix, is
unbiased. Level j compares the tokens S_j that begin with the text's first j pieces: buckets, one of
them S_(j+1), and the rest of S_j. The tokens of a bucket share one gradient factor, so the
student's distribution inside a bucket is not changed. Buckets are ranges of the vocabulary in byte
order; a range inside another takes its tokens out of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.losses.config import LossConfig
from xinslm.losses.divergences import bucket_divergence
from xinslm.losses.inplace import add_at_labels_, softmax_, widest
from xinslm.losses.targets import BucketTargets

LEAST_P = 2e-9
LEAST_Q = 1e-30


def bucket_loss(
    z: Tensor, labels: Tensor, s: BucketTargets, config: LossConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Turn logits (rows, V) into the gradient of scale * (alpha*CE + beta*KD), in place; return
    both of each row, (rows,), in nats.

    KD is the sum of D(p, q) over the levels; without teacher targets, the hard-label cross-entropy.
    """
    covered = s.valid_mask[:, None].to(z.dtype)
    beta = (config.beta * scale) * covered
    alpha = (config.alpha + config.beta) * scale - beta
    at_label = z.gather(1, labels[:, None])
    ce = softmax_(z) - at_label
    bucket, inside = assign(s, z.shape[1])
    q = z.new_zeros(len(z), s.begins.shape[1] + 1, dtype=widest(z)).scatter_add_(
        1, bucket, z.to(widest(z))
    )
    kd, factor = _levels(s, q, inside, config)
    z.mul_(alpha + beta * factor.to(z.dtype).gather(1, bucket))
    add_at_labels_(z, labels, -alpha)
    return ce[:, 0], torch.where(s.valid_mask, kd, ce[:, 0].to(kd.dtype))


def assign(s: BucketTargets, width: int) -> tuple[Tensor, Tensor]:
    """Innermost range of each token, (rows, width) int64: 0 for none, g + 1 for column g.

    Also which range contains which, (rows, buckets, buckets) bool: [r, i, j] if j is inside i and
    smaller.
    """
    rows, buckets = s.begins.shape
    sizes = s.ends - s.begins
    inside = (s.begins[:, :, None] <= s.begins[:, None, :]) & (
        s.ends[:, :, None] >= s.ends[:, None, :]
    )
    inside &= (sizes[:, :, None] > sizes[:, None, :]) & (sizes[:, None, :] > 0)
    around = torch.where(inside, sizes[:, :, None], len(s.order) + 1)
    # index of the smallest range that contains it
    outer = torch.where(inside.any(dim=1), around.argmin(dim=1) + 1, 0)
    step = torch.arange(1, buckets + 1, device=sizes.device) - outer
    paint = sizes.new_zeros(rows, len(s.order) + 1)
    paint.scatter_add_(1, s.begins, step).scatter_add_(1, s.ends, -step)
    bucket = sizes.new_zeros(rows, width)
    bucket[:, s.order] = paint.cumsum(dim=1)[:, :-1]
    return bucket, inside


def _levels(
    s: BucketTargets, q: Tensor, inside: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Divergence of each row, (rows,), and the gradient factor of each bucket's tokens, (rows, 1 +
    buckets).

    q: (rows, 1 + buckets), the student's mass of the tokens with that innermost range; 0 is none.
    """
    rows, buckets = s.begins.shape
    # including the ranges inside
    whole = q[:, 1:] + (inside.to(q.dtype) * q[:, None, 1:]).sum(dim=2)
    there = s.ends > s.begins
    value, total = q.new_zeros(rows), q.sum(dim=1)
    factor = torch.zeros_like(q)
    before = q.new_zeros(rows, 1)  # sum over earlier levels for all tokens of this level's set
    # column of the rest of this level's set
    rest_at = s.begins.new_zeros(rows, 1)
    for level in range(int(s.levels.max()) + 1 if buckets else 0):
        mine = there & (s.levels == level)
        onward = mine & s.onward
        speaks, goes_on = mine.any(dim=1, keepdim=True), onward.any(dim=1, keepdim=True)
        p = s.probs * mine
        p = torch.cat((1 - p.sum(dim=1, keepdim=True).clamp(max=1.0), p), dim=1).to(q.dtype)
        own = torch.cat((q.gather(1, rest_at), torch.where(onward, whole, q[:, 1:])), dim=1)
        used = F.pad(mine, (1, 0), value=True) & (own > 0) & speaks
        own, all_of_it = own.clamp_min(LEAST_Q), total.clamp_min(LEAST_Q)[:, None]
        values, slopes = bucket_divergence(
            p.clamp_min(LEAST_P).log(), (own / all_of_it).log(), config
        )
        values, slopes = values.masked_fill(~used, 0.0), slopes.masked_fill(~used, 0.0)
        value = value + values.sum(dim=1)
        here = (slopes / own - slopes.sum(dim=1, keepdim=True) / all_of_it).masked_fill(
            ~used, 0.0
        ) + before
        factor[:, 1:] = torch.where(mine & ~s.onward, here[:, 1:], factor[:, 1:])
        factor.scatter_(1, rest_at, torch.where(speaks, here[:, :1], factor.gather(1, rest_at)))
        column = onward.to(torch.int8).argmax(dim=1, keepdim=True)
        before = torch.where(goes_on, here[:, 1:].gather(1, column), before)
        total = torch.where(goes_on, whole.gather(1, column), total[:, None])[:, 0]
        rest_at = torch.where(goes_on, column + 1, rest_at)
        factor.scatter_(1, rest_at, torch.where(goes_on, before, factor.gather(1, rest_at)))
    return value, factor
