"""Improve a layer's 4-bit codes and scales in turn, with the inputs' Hessian: GPTQ fixes scales
beforehand and looks at each column once.

- Codes: coordinate descent (QuantEase, Behdin et al., arXiv:2309.01885, section 3). Each weight in
  turn takes the code that minimizes the layer's loss with all others as they are.
- Scales: those of a row are the least-squares solution for its codes. Where rounding them to what
  is stored costs more than the solution gains, a row keeps the scales that it had.

The loss of a layer of SmolLM2-135M falls by 7 % and that of stories5M by 6.5 % on average, and with
it the KL divergence by 5 to 7 %.

    codes, scales = descend(wanted, codes, scales, factor.damped())
"""

import numpy as np
import torch
from torch import Tensor

from xinslm.model.grids import BLOCK, Q4_0, storable

ROUNDS = 2
"""A third one takes off another half percent of the loss."""
_ROWS = 2048
_CHUNK = 1 << 22
"""Numbers of a product for the scales of some rows."""
_RIDGE = 1e-6


def descend(
    wanted: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Q4_0 codes, int8 (rows, columns), and storable scales, float32 (rows, columns / 32),
    with a smaller loss tr((W - Q) H (W - Q)^T) than the given ones, in no row with a larger one.

    wanted: float32 (rows, columns). hessian: float32 (columns, columns), positive definite.
    """
    found = [
        _descend(*part, hessian)
        for part in zip(wanted.split(_ROWS), codes.split(_ROWS), scales.split(_ROWS), strict=True)
    ]
    return torch.cat([part for part, _ in found]), torch.cat([part for _, part in found])


def _descend(
    wanted: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    # (columns, rows): a column's weights lie together
    goal, chosen, scales = wanted.T.contiguous(), codes.T.float(), scales.T.contiguous()
    target = hessian @ goal
    pull, loss = _measure(goal, target, chosen, scales, hessian)
    for _ in range(ROUNDS):
        sweep(pull, chosen, scales, hessian)
        loss = ((goal - _values(chosen, scales)) * pull).sum(0)
        solved = solve_scales(target, chosen, scales, hessian)
        other, losses = _measure(goal, target, chosen, solved, hessian)
        falls = losses < loss
        scales, pull = torch.where(falls, solved, scales), torch.where(falls, other, pull)
    return chosen.T.to(torch.int8).contiguous(), scales.T.contiguous()


def _values(codes: Tensor, scales: Tensor) -> Tensor:
    """Weights of codes (columns, rows) and scales (columns / 32, rows)."""
    return (codes.unflatten(0, (-1, BLOCK)) * scales[:, None]).flatten(0, 1)


def _measure(
    goal: Tensor, target: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """H (W - Q)^T, and the loss of each row."""
    values = _values(codes, scales)
    pull = torch.addmm(target, hessian, values, alpha=-1)
    return pull, ((goal - values) * pull).sum(0)


def sweep(pull: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> None:
    """Choose each column's codes (columns, rows) anew, in place, with the other columns as they are
    by then. `pull` is H (W - Q)^T, (columns, rows), and stays so.
    """
    for start in range(0, len(hessian), BLOCK):
        columns = slice(start, start + BLOCK)
        moved = _sweep_few(
            pull[columns].numpy().copy(),
            hessian[columns, columns].numpy(),
            codes[columns].numpy(),
            scales[start // BLOCK].numpy(),
        )
        pull.addmm_(hessian[:, columns], torch.from_numpy(moved), alpha=-1)


def _sweep_few(
    pull: np.ndarray, hessian: np.ndarray, codes: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """`sweep` of one block, whose part of `pull` is used up; return how far its weights moved."""
    moved = np.empty_like(codes)
    for i, (code, by) in enumerate(zip(codes, moved, strict=True)):
        best = np.rint(code + pull[i] / (hessian[i, i] * scale))
        np.clip(best, Q4_0.lowest, Q4_0.highest, out=best)
        np.multiply(best - code, scale, out=by)
        code[:] = best
        pull[i + 1 :] -= hessian[i + 1 :, i, None] * by
    return moved


def solve_scales(target: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """Storable scales (columns / 32, rows) with the least loss for fixed codes (columns, rows),
    before they are rounded; where a solution is 0 or has another sign, the given scale. `target` is
    H W^T, (columns, rows).
    """
    columns, rows = codes.shape
    groups = columns // BLOCK
    by_group = hessian.unflatten(1, (groups, BLOCK))
    right = (target * codes).unflatten(0, (groups, BLOCK)).sum(1).T.double()
    solved = torch.empty(rows, groups)
    step = max(_CHUNK // (columns * groups), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        blocks = codes[:, part].T.unflatten(1, (groups, BLOCK))
        products = torch.einsum("cgb,rgb->rcg", by_group, blocks)
        gram = torch.einsum("rhb,rhbg->rhg", blocks, products.unflatten(1, (groups, BLOCK)))
        gram = (gram + gram.mT).div_(2).double()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        solved[part] = torch.linalg.solve(gram, right[part]).float()
    keeps = solved.T.sign() * scales.sign() <= 0
    return torch.where(keeps, scales, storable(solved.T))
