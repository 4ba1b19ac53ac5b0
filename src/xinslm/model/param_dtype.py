"""Matrices stored in bfloat16 and multiplied in float32, for processors without fast bfloat16.

A layer's float32 copy exists for one multiplication and is recomputed in the backward pass, so
there is never a float32 copy of the complete model. The gradient is summed in float32 and rounded
once. If the types are equal, or under autocast, the layers behave like PyTorch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer without bias that computes in its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        if x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight)
        result: Tensor = _WideLinear.apply(x, self.weight)
        return result


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = grad @ weight.to(grad.dtype) if wants_x else None
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if wants_weight else None
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


def embed(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows `ids` of `weight` in `dtype`: (...) -> (..., hidden)."""
    if weight.dtype == dtype:
        return F.embedding(ids, weight)
    result: Tensor = _WideEmbedding.apply(ids, weight, dtype)
    return result


class _WideEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        # sums of many gradients need the precision of grad's dtype
        total = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        total.index_add_(0, ids.flatten(), grad.flatten(0, -2))
        return None, total.to(ctx.dtype), None


def cast_matrices_to_bfloat16(model: nn.Module) -> None:
    """Convert a model's matrices to bfloat16, one at a time; vectors stay float32."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
