"""Matrices whose stored type differs from the type they are multiplied in.

- Stored in bfloat16, multiplied in float32, for processors without fast bfloat16 products: a
  layer's float32 copy exists for one multiplication and is recomputed in the backward pass.
- Stored in float32, multiplied in bfloat16 (mixed precision, Micikevicius et al.,
  arXiv:1710.03740): a layer's bfloat16 copy is made once and kept until `forget_copies`, so it
  serves all micro-batches of an optimizer step.

- Rounded to 4 bits in the forward pass (quantization-aware training): a layer's rounded copy is
  kept like a bfloat16 one, and the gradient is that of the copy (the straight-through estimator,
  Bengio et al., arXiv:1308.3432).
- Multiplied with inputs of 8 bits (`int8_inputs.py`).

Gradients have the weight's type and are rounded once. If the types are equal, or under autocast,
the layers behave like PyTorch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xinslm.model.grids import BLOCK, Q4_0, decode, encode, largest_scales
from xinslm.model.int8_inputs import int8_product


class Linear(nn.Linear):
    """A linear layer that computes in its input's type."""

    rounds = False
    """Whether it multiplies with its weight rounded to Q4_0."""
    int8_inputs = False
    """Whether its inputs are rounded to int8; its weight must come from codes."""
    _copy: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        product = self._product(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """The outputs without the bias, whose type may differ from the weight's."""
        weight = self.weight
        if self.int8_inputs:
            return int8_product(x, weight)
        if self.rounds:
            if self._copy is None:
                self._copy = rounded(weight.detach()).to(x.dtype)
            result: Tensor = _NarrowLinear.apply(x, weight, self._copy)
            return result
        if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight)
        if x.dtype.itemsize >= weight.dtype.itemsize:
            result = _WideLinear.apply(x, weight)
            return result
        if self._copy is None:
            self._copy = weight.detach().to(x.dtype)
        result = _NarrowLinear.apply(x, weight, self._copy)
        return result


def rounded(weight: Tensor) -> Tensor:
    """The float32 values that Q4_0 codes of a matrix stand for, the largest weight at -8."""
    scales = largest_scales(weight)
    return decode(encode(weight.float(), scales, Q4_0), scales)


def round_in_forward(model: nn.Module) -> tuple[int, int]:
    """Make the linear layers compute with their weights at 4 bits, where rows are in blocks of 32.

    Their stored weights, which the optimizer moves, keep their type. Returns how many layers do so,
    and how many there are.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.rounds = layer.in_features % BLOCK == 0
    return sum(layer.rounds for layer in layers), len(layers)


def forget_copies(model: nn.Module) -> None:
    """Drop the narrow copies of weights that have changed, or will."""
    for module in model.modules():
        if isinstance(module, Linear):
            module._copy = None


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.dtype = weight.dtype
        return F.linear(x, copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, copy = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = grad @ copy if wants_x else None
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if wants_weight else None
        return grad_x, None if grad_weight is None else grad_weight.to(ctx.dtype), None


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
        # sums of many gradients need float32
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        total.index_add_(0, ids.flatten(), grad.flatten(0, -2).float())
        return None, total.to(ctx.dtype), None


def cast_matrices_to_bfloat16(model: nn.Module) -> None:
    """Convert a model's matrices to bfloat16, one at a time; vectors stay float32."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
