"""The gate of a feed-forward part: silu(gate) * up."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.model.pieces import pieces


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product (arXiv:2002.05202) of two tensors of one shape and dtype.

    Without autograd it is computed in `gate`'s memory.
    """
    if not torch.is_grad_enabled():
        return F.silu(gate, inplace=True).mul_(up)
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    result: Tensor = _Gated.apply(gate, up)
    return result


class _Gated(torch.autograd.Function):
    """Keeps its inputs and computes silu(gate) again; autograd would keep that too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for g, u, out in pieces(gate, up, y):
            torch.mul(F.silu(g), u, out=out)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up)
        )
        for g, u, upstream, out_gate, out_up in pieces(gate, up, grad, of_gate, of_up):
            torch.mul(upstream, F.silu(g), out=out_up)
            torch.ops.aten.silu_backward.grad_input(upstream * u, g, grad_input=out_gate)
        return of_gate, of_up
