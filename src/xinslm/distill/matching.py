"""Hidden-state matching: two distances between the states of a student and a teacher at one
position.

    projector   ||P x - s||^2 / ||s||^2: x is the student's normalized state, s the teacher's
                projected hidden state, P a trained projection
    cka         1 - linear CKA (Kornblith et al. 2019, section 3), invariant to rotation and scale:
                no projection

Both are independent of scale, so one weight fits all depths and models. They are pure functions and
take the states of any student and teacher, in any floating type.
"""

import torch
from torch import Tensor


def projected_error(states: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    """Relative squared error of each row, (N,): states (N, d), matrix (r, d), targets (N, r), none
    of them 0.
    """
    return (states @ matrix.t() - targets).pow(2).sum(1) / targets.pow(2).sum(1)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Similarity in [0, 1] of two descriptions (N, d) and (N, r) of the same N positions, N of at
    least 2.

    With few positions it is too high, whatever the two are: of independent columns about d / N.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    cross = (x.t() @ y).pow(2).sum()
    own = (x.t() @ x).pow(2).sum() * (y.t() @ y).pow(2).sum()
    return cross * torch.rsqrt(own.clamp_min(torch.finfo(x.dtype).tiny))
