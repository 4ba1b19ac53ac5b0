"""Draw tokens for many rows of logits at once, one uniform number per row.

A repetition penalty comes first. Filters look at the distribution, then the temperature reshapes
what they kept, as in llama.cpp and `inference.sampling`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.sampling import Sampling
from xinslm.topk import BLOCK, blocked_topk

CANDIDATES = (256, 4096, 1 << 62)
"""Most likely tokens to filter, until all that are kept are among them."""
CHUNK = 1 << 19
"""Logits that a CPU works on at once: they stay in its cache."""


def choose(
    logits: Tensor, sampling: Sampling, uniforms: np.ndarray, seen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one id per row with one uniform number each; return ids (rows,) int64 and their
    log-probabilities under the model itself (rows,) float64.

    logits: (rows, width), -inf where there is no token. A row that holds NaN or infinity has a
    log-probability that is not finite. seen: the ids that the repetition penalty is for, (rows, n)
    int64; repeated ones count once. Without it there is no penalty.
    """
    if seen is not None and sampling.repetition_penalty != 1:
        drawn, _ = choose(penalised(logits, seen, sampling.repetition_penalty), sampling, uniforms)
        wide = logits.float()
        at_drawn = wide.gather(1, torch.from_numpy(drawn).to(logits.device)[:, None])[:, 0]
        own = at_drawn - wide.logsumexp(dim=1)
        return drawn, own.cpu().numpy().astype(np.float64)
    rows = max(1, CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = [
        _choose(logits[at : at + rows], sampling, uniforms[at : at + rows])
        for at in range(0, len(logits), rows)
    ]
    ids, log_probs = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return ids, log_probs.astype(np.float64)


def penalised(logits: Tensor, seen: np.ndarray, penalty: float) -> Tensor:
    """A copy of logits (rows, width) whose entries at the ids in `seen`, (rows, n), are divided by
    the penalty if positive and multiplied by it if negative.
    """
    ids = torch.from_numpy(seen).to(logits.device)
    values = logits.float().gather(1, ids)
    values = torch.where(values > 0, values / penalty, values * penalty)
    return logits.float().scatter(1, ids, values)


def _choose(logits: Tensor, sampling: Sampling, uniforms: np.ndarray) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    quantiles = torch.from_numpy(uniforms).to(logits.device, wide)[:, None]
    logits = logits.float()
    logits = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=-torch.inf)
    largest = logits.amax(dim=1, keepdim=True)
    weights, sums = _weights(logits - largest)
    log_total = largest.to(wide) + sums[:, -1:].log()
    if sampling.temperature == 0:
        ids = logits.argmax(dim=1, keepdim=True)
    elif not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        if sampling.temperature != 1:
            weights, sums = _weights((logits - largest).div_(sampling.temperature))
        ids = _invert(weights, sums, quantiles)
    else:
        ids = _filtered(logits, sampling, log_total, quantiles)
    return ids[:, 0], (logits.gather(1, ids).to(wide) - log_total)[:, 0]


def _filtered(logits: Tensor, sampling: Sampling, log_total: Tensor, quantiles: Tensor) -> Tensor:
    """Draw from what the filters keep, (rows, 1); rows that keep many tokens are sorted apart."""
    result = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    for k in (sampling.top_k,) if sampling.top_k else CANDIDATES:
        kept, probabilities, is_whole = kept_tokens(logits[rows], sampling, log_total[rows], k)
        cumulative = probabilities.to(quantiles.dtype).cumsum(dim=1)
        targets = quantiles[rows] * cumulative[:, -1:]
        places = torch.searchsorted(cumulative, targets, right=True)
        last = (probabilities > 0).sum(dim=1, keepdim=True) - 1
        result[rows] = kept.gather(1, torch.minimum(places, last))
        rows = rows[~is_whole]
        if not len(rows):
            break
    return result


def kept_tokens(
    logits: Tensor, sampling: Sampling, log_total: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Filter the k most likely tokens of each row; return ids and probabilities, most likely first,
    0 for removed tokens, both (rows, k), and whether all tokens to keep are among them, (rows,).

    `log_total` is the logarithm of the normalizer over the full vocabulary, (rows, 1). Ties are
    ordered by id, so a seed gives the same text in bfloat16 on every device.
    """
    ids = blocked_topk(logits, min(k, logits.shape[1]))[1].sort(dim=1).values
    values, order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    wide = values if values.device.type == "mps" else values.double()
    # with top_k, the other filters look at the distribution over what it kept
    total = wide.logsumexp(dim=1, keepdim=True) if sampling.top_k else log_total
    p = (wide - total).exp()
    before = p.cumsum(dim=1) - p
    keeps = (before < sampling.top_p * (1 - 1e-12)) & (p >= sampling.min_p * p[:, :1])
    if sampling.top_p == 1:
        keeps = p >= sampling.min_p * p[:, :1]
    is_whole = ~keeps[:, -1] if not sampling.top_k else torch.ones_like(keeps[:, -1])
    scaled = (wide / sampling.temperature).masked_fill(~keeps, -torch.inf)
    return ids, torch.softmax(scaled, dim=1), is_whole


def _weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials in blocks (rows, blocks, `BLOCK`), and the blocks' cumulative sums (rows,
    blocks).
    """
    weights = logits.exp_().view(len(logits), -1, BLOCK)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return weights, weights.sum(dim=2).to(wide).cumsum(dim=1)


def _invert(weights: Tensor, cumulative: Tensor, quantiles: Tensor) -> Tensor:
    """Invert the cumulative distribution in two levels, blocks and tokens in a block: (rows, 1)."""
    targets = quantiles * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, targets, right=True).clamp(max=weights.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = (
        weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
        .to(quantiles.dtype)
        .cumsum(dim=1)
    )
    place = (inside <= targets - before).sum(dim=1, keepdim=True)
    # rounding must not select a token of weight 0
    place = torch.minimum(place, (inside < inside[:, -1:]).sum(dim=1, keepdim=True))
    return block * BLOCK + place
