"""Draw tokens for many rows of logits at once, one uniform number per row."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.sampling import Sampling
from xinslm.topk import BLOCK, blocked_topk


def choose(logits: Tensor, sampling: Sampling, uniforms: np.ndarray) -> Tensor:
    """Draw one id per row, (rows,) int64, with one uniform number each.

    logits: (rows, width), -inf where there is no token. Filters first, then the temperature.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    quantiles = torch.from_numpy(uniforms).to(logits.device, wide)[:, None]
    if logits.dtype != torch.float64:
        logits = logits.float()
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return _draw_from_all(logits, sampling.temperature, quantiles)
    ids, probabilities = kept_tokens(logits, sampling)
    cumulative = probabilities.to(wide).cumsum(dim=1)
    places = torch.searchsorted(cumulative, quantiles * cumulative[:, -1:], right=True)
    last = (probabilities > 0).sum(dim=1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(places, last))[:, 0]


def kept_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Filter each row; return ids and probabilities, most likely first, 0 for removed tokens.

    Ties are ordered by id, so a seed gives the same text in bfloat16 on every device.
    """
    for k in (sampling.top_k,) if sampling.top_k else (256, logits.shape[1]):
        ids = blocked_topk(logits, min(k, logits.shape[1]))[1].sort(dim=1).values
        values, order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
        wide = values if values.device.type == "mps" else values.double()
        # Without top_k the filters need the normalizer over the full vocabulary.
        total = wide.logsumexp(dim=1, keepdim=True)
        if not sampling.top_k:
            total = torch.logsumexp(logits, dim=1, keepdim=True).to(wide.dtype)
        p = (wide - total).exp()
        before = p.cumsum(dim=1) - p
        keeps = (before < sampling.top_p * (1 - 1e-12)) & (p >= sampling.min_p * p[:, :1])
        if sampling.top_p == 1:
            keeps = p >= sampling.min_p * p[:, :1]
        if sampling.top_k or not bool(keeps[:, -1].any()):
            break
    scaled = (wide / sampling.temperature).masked_fill(~keeps, -torch.inf)
    return ids, torch.softmax(scaled, dim=1)


def _draw_from_all(logits: Tensor, temperature: float, quantiles: Tensor) -> Tensor:
    """Invert the cumulative distribution in two levels, blocks and tokens in a block."""
    rows = len(logits)
    weights = (logits - logits.amax(dim=1, keepdim=True)).div_(temperature).exp_()
    weights = F.pad(weights, (0, -logits.shape[1] % BLOCK)).view(rows, -1, BLOCK)
    cumulative = weights.sum(dim=2).to(quantiles.dtype).cumsum(dim=1)
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
    return (block * BLOCK + place)[:, 0]
