"""The losses: the fused head, its divergences, and the kinds of teacher targets.

from xinslm.losses import LossConfig, fused_loss, next_tokens
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xinslm.losses.config import LossConfig
    from xinslm.losses.fused import HeadOptions, LossMetrics, fused_loss, next_tokens
    from xinslm.losses.targets import (
        BucketTargets,
        DenseTargets,
        MixedTargets,
        SparseTargets,
        Targets,
    )

__all__ = [
    "BucketTargets",
    "DenseTargets",
    "HeadOptions",
    "LossConfig",
    "LossMetrics",
    "MixedTargets",
    "SparseTargets",
    "Targets",
    "fused_loss",
    "next_tokens",
]

_MODULES = {
    "HeadOptions": "fused",
    "LossConfig": "config",
    "LossMetrics": "fused",
    "fused_loss": "fused",
    "next_tokens": "fused",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: settings are read without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no {name}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'targets')}"), name)
