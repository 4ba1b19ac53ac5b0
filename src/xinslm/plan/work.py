"""Floating-point operations of each stage, and the time they take on named devices.

`model.operations` counts the forward and the backward pass; gradient checkpointing costs one more
forward pass through the blocks. This machine is measured (`measured.py`). The other devices'
numbers are the vendors' published dense peaks; the share of the peak that training reaches there is
an assumption, printed in the table.
"""

from dataclasses import dataclass

from xinslm.model import operations
from xinslm.model.config import ModelConfig
from xinslm.model.operations import forward_operations
from xinslm.plan.memory import matrices
from xinslm.train.config import PretrainConfig

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Device:
    """A machine that a stage could run on."""

    name: str
    float32: float
    """Peak in float32, 10^12 operations per second."""
    bfloat16: float
    """Peak of bfloat16 matrix products, in the same unit."""
    share: float
    """Share of the peak that training reaches."""
    memory_gib: float | None = None
    scoring_share: float | None = None
    """The same of scoring, if it was measured; otherwise that of training."""

    def seconds(self, operations: float, dtype: str, is_scoring: bool = False) -> float:
        """Time for this number of operations."""
        peak = self.float32 if dtype == "float32" else self.bfloat16
        share = self.scoring_share if is_scoring and self.scoring_share else self.share
        return operations / (peak * 1e12 * share)


DEVICES = (
    Device("Mac mini M2", 3.6, 3.6, 0.4, 16),
    Device("Mac mini M4", 4.3, 4.3, 0.4, 16),
    Device("RTX 4090", 82.6, 165.2, 0.35, 24),
    Device("A100 80 GB", 19.5, 312.0, 0.4, 80),
    Device("H100 SXM", 67.0, 989.0, 0.35, 80),
)


def training_operations(shape: ModelConfig, config: PretrainConfig) -> float:
    """Operations per token of training, including the optimizer's matrix products."""
    blocks, _ = forward_operations(shape, config.max_seq_length)
    total = operations.training_operations(shape, config.max_seq_length)
    total += blocks if config.gradient_checkpointing else 0
    if config.optimizer == "muon":
        step = 0.0
        for m in matrices(shape):
            small, large = sorted((m.rows, m.columns))
            step += (
                m.hidden
                * m.count
                * NEWTON_SCHULZ_STEPS
                * (4.0 * small * small * large + 2.0 * small**3)
            )
        total += step / (config.batch_size * config.max_seq_length)
    return total
