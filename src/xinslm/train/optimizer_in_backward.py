"""The optimizer step inside the backward pass: each gradient is used and freed as soon as it is
complete.

This saves the memory of all gradients but one (Lv et al., LOMO, arXiv:2306.09782). The norm of the
full gradient is not known at that time, so a tensor is scaled by min(1, max_grad_norm / n), where n
is the larger of the previous step's norm and this step's norm so far. A spike is limited from the
tensor on that shows it; a step without clipping equals the ordinary one bit for bit. A tied
embedding is stepped once, after both of its gradients have come.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from xinslm.train.optimizers import Optimizer


class BackwardSteps:
    """Steps parameters from hooks while `during` is entered; one backward pass for each entry."""

    def __init__(self, optimizer: Optimizer, limit: float) -> None:
        self.optimizer, self.limit = optimizer, limit or math.inf
        self.previous = 0.0
        """Norm of the full gradient at the previous step; 0 before the first."""
        self._active, self._squares = False, 0.0
        for parameter in optimizer.group_of:
            parameter.register_post_accumulate_grad_hook(self._take)

    @property
    def norm(self) -> float:
        """Norm of the gradients that have come in this step, before clipping."""
        return math.sqrt(self._squares)

    @contextmanager
    def during(self) -> Iterator[None]:
        """Step parameters within the block, as their gradients come; after it `norm` is the
        step's.
        """
        self._active, self._squares = True, 0.0
        try:
            yield
        finally:
            self._active = False
        self.previous = self.norm

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        assert parameter.grad is not None
        self._squares += gradient_square(parameter)
        if math.isfinite(self._squares):  # after the first that is not, nothing more is changed
            norm = max(self.previous, self.norm)
            self.optimizer.step_parameter(
                parameter, self.limit / norm if norm > self.limit else 1.0
            )
        parameter.grad = None


def gradient_square(parameter: nn.Parameter) -> float:
    """Square of the L2 norm of a parameter's gradient; of bfloat16, summed in float32."""
    assert parameter.grad is not None
    return float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).item()) ** 2


def clip(model: nn.Module, limit: float) -> tuple[float, float]:
    """Norm of the full gradient, and what to multiply it by in the step so that it is at most
    `limit` (0: none).

    Gradients that are all float32 are scaled here, and the factor is 1.
    """
    limit = limit or math.inf
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return nn.utils.clip_grad_norm_(model.parameters(), limit).item(), 1.0
    norm = math.sqrt(sum(gradient_square(p) for p in model.parameters() if p.grad is not None))
    return norm, limit / norm if norm > limit else 1.0
