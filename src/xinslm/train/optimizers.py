"""The optimizers: AdamW, AdamW with 8-bit states, Muon; on float32 or bfloat16 weights.

One class steps one parameter at a time, so that every combination also works inside the backward
pass (`optimizer_in_backward.py`) and is saved in the same way. AdamW (arXiv:1711.05101) on float32
weights is PyTorch's fused kernel. The others work on pieces that fit into the processor's cache:
weights and states are converted to float32 there and stored in their own types.

Muon (Jordan et al. 2024; Liu et al., arXiv:2502.16982) updates the hidden matrices; AdamW updates
embeddings, head and vectors. Muon's step has the size of AdamW's (0.2 sqrt(max(rows, columns))), so
one learning rate serves both. PyTorch's own Muon iterates in bfloat16, which is eight times slower
than float32 on processors without such instructions.
"""

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from xinslm.train.blockwise_8bit import (
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
    num_blocks,
)
from xinslm.train.config import TrainingConfig
from xinslm.train.stochastic_rounding import RandomBits, round_into

EPSILON = 1e-8
MOMENTUM = 0.95
"""Muon's."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
SMALLEST_IN_8_BITS = 4096
"""Matrices of fewer numbers keep float32 states."""
_CPU_PIECE, _PIECE = 1 << 16, 1 << 24


def make_optimizer(model: nn.Module, config: TrainingConfig) -> "Optimizer":
    """The optimizer of the parameters that require gradients."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return Optimizer(named, {name: _rule(name, p, config.optimizer) for name, p in named}, config)


def _rule(name: str, parameter: Tensor, optimizer: str) -> str:
    if optimizer == "muon":
        return "muon" if parameter.dim() == 2 and ".layers." in name else "adamw"
    small = parameter.dim() < 2 or parameter.numel() < SMALLEST_IN_8_BITS
    return "adamw" if small else optimizer


class Optimizer(torch.optim.Optimizer):
    """Steps parameters by the rule of their group: `adamw`, `adamw8bit` or `muon`; decay on
    matrices only.
    """

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], rules: dict[str, str], config: TrainingConfig
    ) -> None:
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in named:
            groups.setdefault((rules[name], parameter.dim() > 1), []).append(parameter)
        self.names = {parameter: name for name, parameter in named}
        self.seed, self.betas = config.seed, (config.adam_beta1, config.adam_beta2)
        super().__init__(
            [
                {
                    "params": parameters,
                    "rule": rule,
                    "weight_decay": config.weight_decay if matrix else 0.0,
                }
                for (rule, matrix), parameters in groups.items()
            ],
            {"lr": config.learning_rate},
        )
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient; `scale` multiplies the gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            fused = [p for p in parameters if scale == 1.0 and self._is_fused(p, group)]
            self._fused(fused, group)
            done = set(fused)
            for parameter in parameters:
                if parameter not in done:
                    self.step_parameter(parameter, scale)

    @torch.no_grad()
    def step_parameter(self, parameter: nn.Parameter, scale: float = 1.0) -> None:
        """Step one parameter by its gradient times `scale`."""
        group = self.group_of[parameter]
        assert parameter.grad is not None
        if self._is_fused(parameter, group):
            if scale != 1.0:
                parameter.grad.mul_(scale)
            self._fused([parameter], group)
            return
        state = self.state_of(parameter)
        state["step"] += 1
        if group["rule"] == "muon":
            self._muon(parameter, state, group, scale)
        else:
            self._adamw(parameter, state, group, scale)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """A parameter's tensors between steps, made at the first call."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(self.empty_state(parameter))
        return state

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State before the first step; keys, shapes and types are what a checkpoint must hold."""
        group, device = self.group_of[parameter], parameter.device
        state = {
            "step": torch.zeros((), device=device if self._is_fused(parameter, group) else "cpu")
        }
        if group["rule"] == "muon":
            return state | {"momentum": torch.zeros_like(parameter, dtype=torch.float32)}
        for name, kind in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            if group["rule"] == "adamw8bit":
                state[name] = torch.zeros_like(parameter, dtype=kind)
                state[f"{name}_scale"] = torch.zeros(num_blocks(parameter.numel()), device=device)
            else:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def _is_fused(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        return group["rule"] == "adamw" and parameter.dtype == torch.float32

    def _fused(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        if not parameters:
            return
        states = [self.state_of(p) for p in parameters]
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPSILON,
            maximize=False,
        )

    def _bits(self, parameter: nn.Parameter, state: dict[str, Any]) -> RandomBits:
        number = zlib.crc32(self.names[parameter].encode())
        return RandomBits((self.seed, int(state["step"].item()), number), parameter.device)

    def _adamw(
        self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any], scale: float
    ) -> None:
        assert parameter.grad is not None
        beta1, beta2 = self.betas
        number, rate = state["step"].item(), group["lr"]
        size, correction = rate / (1 - beta1**number), math.sqrt(1 - beta2**number)
        narrow = parameter.dtype != torch.float32
        bits = self._bits(parameter, state) if narrow else None
        weights, gradients = parameter.data.view(-1), parameter.grad.reshape(-1)
        for piece in _pieces(parameter):
            # float32 stays itself
            weight, gradient = weights[piece].float(), gradients[piece].float()
            if scale != 1.0:
                gradient = gradient * scale
            first, second = _load(state, piece)
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            _store(state, piece, first, second)
            weight.mul_(1 - rate * group["weight_decay"])
            weight.addcdiv_(first, second.sqrt().div_(correction).add_(EPSILON), value=-size)
            if bits is not None:
                round_into(weights[piece], weight, bits)

    def _muon(
        self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any], scale: float
    ) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        if scale != 1.0:
            gradient = gradient * scale
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalize(gradient.lerp(momentum, MOMENTUM))
        size = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
        weight = parameter.data.float()
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)
        if parameter.dtype != torch.float32:
            bits = self._bits(parameter, state)
            for piece in _pieces(parameter):
                round_into(parameter.data.view(-1)[piece], weight.view(-1)[piece], bits)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of `matrix` (rows, columns) near 1 by Newton-Schulz; float32.

    Iterates in bfloat16 on cuda, in float32 elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / matrix.norm().clamp_min(1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


def _pieces(parameter: Tensor) -> list[slice]:
    size = _CPU_PIECE if parameter.device.type == "cpu" else _PIECE
    return [
        slice(at, min(at + size, parameter.numel())) for at in range(0, parameter.numel(), size)
    ]


def _scales(piece: slice) -> slice:
    return slice(num_blocks(piece.start), num_blocks(piece.stop))


def _load(state: dict[str, Any], piece: slice) -> tuple[Tensor, Tensor]:
    first, second = state["exp_avg"].view(-1)[piece], state["exp_avg_sq"].view(-1)[piece]
    if "exp_avg_scale" not in state:
        return first, second
    scales = _scales(piece)
    return (
        decode_signed(first, state["exp_avg_scale"][scales]),
        decode_positive(second, state["exp_avg_sq_scale"][scales]),
    )


def _store(state: dict[str, Any], piece: slice, first: Tensor, second: Tensor) -> None:
    if "exp_avg_scale" not in state:
        return
    scales = _scales(piece)
    for name, (codes, scale) in (
        ("exp_avg", encode_signed(first)),
        ("exp_avg_sq", encode_positive(second)),
    ):
        state[name].view(-1)[piece].copy_(codes)
        state[f"{name}_scale"][scales].copy_(scale)
