"""The fused head against dense PyTorch, on the student's own hidden states and the teacher's own
entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xinslm.doctor.checks import Examination, require
from xinslm.doctor.dense import dense_loss
from xinslm.losses.config import Divergence, LossConfig
from xinslm.losses.fused import fused_loss
from xinslm.losses.targets import DenseTargets, SparseTargets

TOLERANCE, SLOPE_TOLERANCE = 1e-3, 0.05
LABELS_ALONE = LossConfig(alpha=1.0, beta=0.0)
HALVED = LossConfig(alpha=0.5, beta=0.5)
AT_TWO = LossConfig(alpha=0.0, beta=1.0, temperature=2.0)
OTHERS: tuple[Divergence, ...] = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
REPORT = "Do not train here with this build of PyTorch; please report it with your versions"


@dataclass(frozen=True)
class Positions:
    """What the losses are computed on; no gradients."""

    hidden: Tensor
    """(N, d) float32."""
    weight: Tensor
    """(V, d) float32, the student's head."""
    labels: Tensor
    """(N,) int64."""
    targets: SparseTargets
    teacher: str
    """What `targets` are, for the lines."""


def check_losses(examination: Examination, at: Positions, seed: int) -> None:
    """Compare values and gradients, and try what temperature and agreement do."""
    examination.make("fused cross-entropy", lambda: _compare(at, None, LABELS_ALONE))
    examination.make("fused distillation", lambda: _compare(at, at.targets, HALVED))
    examination.make("fused distillation, T=2", lambda: _compare(at, at.targets, AT_TWO))
    others = [LossConfig(0.5, 0.5, divergence=divergence) for divergence in OTHERS]
    examination.make("other divergences", lambda: _compare(at, at.targets, *others))
    examination.make("temperature", lambda: _temperature(at, seed))
    examination.make("student as teacher", lambda: _own_teacher(at))


def _fused(
    at: Positions, targets: SparseTargets | DenseTargets | None, config: LossConfig
) -> tuple[float, Tensor, Tensor]:
    """Loss and its gradients for hidden states and head."""
    hidden, weight = at.hidden.clone().requires_grad_(), at.weight.clone().requires_grad_()
    loss, _ = fused_loss(hidden, weight, at.labels, targets, config)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.item(), hidden.grad, weight.grad


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest number; NaN counts as infinite."""
    expected = expected.double()
    difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def _compare(at: Positions, targets: SparseTargets | None, *configs: LossConfig) -> str:
    of_value = of_gradient = 0.0
    for config in configs:
        value, *gradients = _fused(at, targets, config)
        hidden, weight = at.hidden.double().requires_grad_(), at.weight.double().requires_grad_()
        expected = dense_loss(hidden, weight, at.labels, targets, config)
        expected.backward()
        assert hidden.grad is not None and weight.grad is not None
        of_value = max(of_value, relative(torch.tensor(value), expected.detach()))
        of_gradient = max(
            of_gradient, relative(gradients[0], hidden.grad), relative(gradients[1], weight.grad)
        )
    against = "" if targets is None else f", {at.teacher}"
    return require(
        of_value <= TOLERANCE and of_gradient <= TOLERANCE,
        f"differs from dense autograd by {of_value:.1e} in value, {of_gradient:.1e} in gradient "
        f"(at most {TOLERANCE:g}; {len(at.labels)} positions{against})",
        REPORT,
    )


def _temperature(at: Positions, seed: int) -> str:
    """T has an effect, and the gradient at T=2 is the slope of the loss."""
    at_one, *_ = _fused(at, at.targets, LossConfig(alpha=0.0, beta=1.0))
    at_two, gradient, _ = _fused(at, at.targets, AT_TWO)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(at.hidden.shape, generator=generator).to(at.hidden)
    # a slope that is not 0
    direction = direction / direction.norm() + gradient / gradient.norm().clamp_min(1e-30)
    step = 3e-3 * float(at.hidden.norm()) / float(direction.norm())
    values = [
        fused_loss(at.hidden + sign * step * direction, at.weight, at.labels, at.targets, AT_TWO)[
            1
        ].kd
        for sign in (1, -1)
    ]
    slope = (values[0] - values[1]) / (2 * step * len(at.labels))
    expected = float((gradient * direction).sum())
    off = abs(slope / expected - 1) if expected else float("inf")
    # with one top-k token T has no effect
    has_effect = at_one != at_two or at.targets.top_k_ids.shape[1] < 2
    return require(
        off <= SLOPE_TOLERANCE and has_effect,
        f"loss {at_one:.4f} at T=1, {at_two:.4f} at T=2; gradient off finite differences by "
        f"{off:.2%} (at most {SLOPE_TOLERANCE:.0%})",
        REPORT,
    )


def _own_teacher(at: Positions) -> str:
    """If teacher and student are equal, there is nothing to learn."""
    targets = DenseTargets(lambda rows: at.hidden[rows] @ at.weight.T)
    _, gradient, _ = _fused(at, targets, LossConfig(alpha=0.0, beta=1.0))
    _, usual, _ = _fused(at, None, LABELS_ALONE)
    share = float(gradient.abs().max() / usual.abs().max().clamp_min(1e-30))
    detail = f"gradient {share:.1e} of cross-entropy's (at most {TOLERANCE:g})"
    return require(share <= TOLERANCE, detail, REPORT)
