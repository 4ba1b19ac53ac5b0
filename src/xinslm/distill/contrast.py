"""InfoNCE between hidden states (van den Oord et al. 2018, equation 4): recognize the teacher's
state at the same position among its states at other positions of the batch.

Positions with the same next token are not negatives, since their states should be similar. Cosines
are taken after subtracting the mean over positions: the states of a language model share a large
common direction (Ethayarajh 2019), which would make all cosines close to 1.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(anchors: Tensor, positives: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over N positions of -log softmax(cosine / temperature) at the position's own positive.

    anchors, positives: (N, r), row i of one belongs to row i of the other. labels: (N,) int64, the
    next tokens.
    """
    anchors, positives = anchors - anchors.mean(0), positives - positives.mean(0)
    scores = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).t() / temperature  # (N, N)
    same = labels[:, None] == labels[None, :]
    same.fill_diagonal_(False)
    own = torch.arange(len(labels), device=labels.device)
    return F.cross_entropy(scores.masked_fill(same, -torch.inf), own)


def draw_places(candidates: np.ndarray, count: int, seed: tuple[int, ...]) -> np.ndarray:
    """At most `count` of the candidates, rising, drawn from the seed alone: a continued run draws
    the same.
    """
    if len(candidates) <= count:
        return candidates
    return np.sort(np.random.default_rng(seed).choice(candidates, count, replace=False))
