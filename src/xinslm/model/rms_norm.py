"""The norm of the student's blocks and heads."""

from typing import Any

import torch
from torch import Tensor, nn

from xinslm.model.pieces import pieces


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size), in x's dtype."""
        result: Tensor = _Normalize.apply(x, self.weight, self.eps)
        return result


class _Normalize(torch.autograd.Function):
    """Keeps its input and one number a row; autograd would keep three tensors of x's size. Works on
    pieces that stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        scales = []
        for rows, out in pieces(x, y):
            wide = rows.float()
            scales.append(wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_())  # (n, 1)
            out.copy_(wide * scales[-1]).mul_(weight)
        ctx.save_for_backward(x, weight, torch.cat(scales))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight, start = torch.zeros_like(weight, dtype=torch.float32), 0
        for rows, upstream, out in pieces(x, grad, grad_x):
            scale = scales[start : (start := start + len(rows))]
            unit, wide = rows.float() * scale, upstream.float()
            product = wide * unit
            grad_weight += product.sum(0)
            along = product.mul_(weight).mean(-1, keepdim=True)
            out.copy_((wide * weight).sub_(unit.mul_(along)).mul_(scale))
        return grad_x, grad_weight.to(weight.dtype), None
