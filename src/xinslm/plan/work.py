"""Floating-point operations of each stage, and the time they take on named devices.

A multiplication and an addition count as two operations. A forward pass costs two operations per
token and parameter of the matrices (including the head), plus attention over half the row. The
backward pass costs twice the forward pass, gradient checkpointing one more forward pass through the
blocks. The devices' numbers are the vendors' published dense peaks; the share of the peak that
training reaches is an assumption, printed in the table.
"""

import time
from dataclasses import dataclass

from xinslm.model.config import ModelConfig
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
    """Assumed share of the peak that training reaches."""
    memory_gib: float | None = None

    def seconds(self, operations: float, dtype: str) -> float:
        """Time for this number of operations."""
        peak = self.float32 if dtype == "float32" else self.bfloat16
        return operations / (peak * 1e12 * self.share)


DEVICES = (
    Device("Mac mini M2", 3.6, 3.6, 0.4, 16),
    Device("Mac mini M4", 4.3, 4.3, 0.4, 16),
    Device("RTX 4090", 82.6, 165.2, 0.35, 24),
    Device("A100 80 GB", 19.5, 312.0, 0.4, 80),
    Device("H100 SXM", 67.0, 989.0, 0.35, 80),
)


def forward_operations(shape: ModelConfig, length: int) -> tuple[float, float]:
    """Operations per token of a forward pass: of the blocks, and of the head."""
    hidden = sum(m.size * m.count for m in matrices(shape) if m.hidden)
    seen = min(length, shape.sliding_window or length) / 2
    attention = shape.num_hidden_layers * 4 * seen * shape.num_attention_heads * shape.head_dim
    return 2.0 * hidden + attention, 2.0 * shape.vocab_size * shape.hidden_size


def training_operations(shape: ModelConfig, config: PretrainConfig) -> float:
    """Operations per token of training, including the optimizer's matrix products."""
    blocks, head = forward_operations(shape, config.max_seq_length)
    total = 3 * (blocks + head) + (blocks if config.gradient_checkpointing else 0)
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


def measure_here(dtype: str = "float32") -> Device:
    """Measure this machine on matrix products of a training step's size, in about a second."""
    import torch

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    device = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    left, right = (
        torch.randn(512, 1024, device=device, dtype=kind),
        torch.randn(1024, 1024, device=device, dtype=kind),
    )
    best, end = float("inf"), time.perf_counter() + 0.7
    while time.perf_counter() < end:
        began = time.perf_counter()
        product = left @ right
        product[0, 0].item()
        best = min(best, time.perf_counter() - began)
    rate = 2 * 512 * 1024 * 1024 / best / 1e12
    return Device(
        f"this machine ({device}, {torch.get_num_threads()} threads, measured)", rate, rate, 0.7
    )
