"""How fast this machine trains and scores a model, measured on one and two of its blocks.

The matrix products of a step reach a share of the processor's peak that depends on the processor
and on the widths: .1 to .7 on the machines of docs/results.md. So a training step of a model with
one block, and one with two, is timed, and the time of all blocks follows from the difference.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xinslm.device import pick_device
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import HeadOptions, fused_loss
from xinslm.losses.memory import HeadMemory
from xinslm.model.config import ModelConfig
from xinslm.model.operations import forward_operations
from xinslm.model.param_dtype import forget_copies
from xinslm.model.transformer import Transformer
from xinslm.plan.work import Device, training_operations
from xinslm.precision import (
    compute_dtype,
    product_rate,
    round_products,
    rounds_products,
    use_fast_float32,
)
from xinslm.train.config import PretrainConfig
from xinslm.train.optimizers import make_optimizer

MOST_OPERATIONS = 2e11
"""Of a timed training step; fewer positions are taken for wide models."""
FEWEST_POSITIONS, MOST_POSITIONS = 256, 2048
RUNS = 3
"""Of each step; the first prepares kernels, the fastest of the others counts."""


@dataclass(frozen=True)
class Speed:
    """10^12 operations per second, as `plan` counts them."""

    peak: float
    """Of matrix products alone, in the type that training multiplies in."""
    training: float
    scoring: float
    """Of a forward pass with LM head."""


def measure_speed(shape: ModelConfig, config: PretrainConfig) -> Speed:
    """Time steps of this model with the batch, the row length and the types of `config`."""
    device = pick_device(config.device)
    dtype = compute_dtype(config.compute_dtype, device)
    if device.type == "cpu":
        use_fast_float32()
    rows, length = _rows(shape, config)
    positions = rows * length
    layers = shape.num_hidden_layers
    times = [
        _times(replace(shape, num_hidden_layers=count), config, (rows, length), dtype)
        for count in ((1, 2) if layers > 1 else (1,))
    ]
    learning, updating, scoring = (_extrapolated(part, layers) for part in zip(*times, strict=True))
    step = config.batch_size * config.max_seq_length
    training = learning + updating * positions / step
    forward = sum(forward_operations(shape, length))
    # of the optimizer and of checkpointing; attention is counted for the timed length
    more = training_operations(shape, config)
    more -= 3 * sum(forward_operations(shape, config.max_seq_length))
    return Speed(
        product_rate(dtype, device.type) / 1e12,
        (3 * forward + more) * positions / training / 1e12,
        forward * positions / scoring / 1e12,
    )


def measure_here(shape: ModelConfig, config: PretrainConfig) -> Device:
    """This machine, by timed steps of a part of the model."""
    speed, device = measure_speed(shape, config), pick_device(config.device).type
    return Device(
        f"this machine ({device}, {torch.get_num_threads()} threads, measured)",
        speed.peak,
        speed.peak,
        speed.training / speed.peak,
        scoring_share=speed.scoring / speed.peak,
    )


def _rows(shape: ModelConfig, config: PretrainConfig) -> tuple[int, int]:
    """Rows and positions of a row to time."""
    length = min(config.max_seq_length, MOST_POSITIONS)
    two = replace(shape, num_hidden_layers=min(2, shape.num_hidden_layers))
    of_position = 3 * sum(forward_operations(two, length))
    allowed = min(MOST_POSITIONS, max(FEWEST_POSITIONS, int(MOST_OPERATIONS / of_position)))
    length = min(length, allowed)
    return min(config.batch_size, max(1, allowed // length)), length


def _times(
    shape: ModelConfig, config: PretrainConfig, size: tuple[int, int], dtype: torch.dtype
) -> tuple[float, float, float]:
    """Seconds of forward and backward pass, of the optimizer, and of a forward pass alone."""
    device = pick_device(config.device)
    generator = torch.Generator().manual_seed(0)
    model = Transformer(shape, config.gradient_checkpointing)
    model.initialise(generator)  # with larger weights probabilities would be denormal, and slow
    model = model.to(device).train()
    optimizer, head = make_optimizer(model, config), HeadOptions(memory=HeadMemory())
    ids = torch.randint(0, shape.vocab_size, size, generator=generator).to(device)
    labels = ids.flatten()

    def learn() -> None:
        forget_copies(model)
        optimizer.zero_grad(set_to_none=True)
        loss().backward()

    def loss() -> Tensor:
        hidden = model.hidden(ids).flatten(0, 1)
        return fused_loss(hidden, model.head_weight, labels, None, LossConfig(), head=head)[0]

    model.compute_dtype = dtype
    learning = fastest(learn, device)
    updating = fastest(lambda: optimizer.step(1.0), device)
    optimizer.zero_grad(set_to_none=True)
    model.compute_dtype = None
    model.eval()
    if rounds_products("auto", device):
        round_products(model)
    return learning, updating, fastest(torch.no_grad()(loss), device)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run after the first."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _extrapolated(seconds: tuple[float, ...], layers: int) -> float:
    """Seconds with all blocks, from those with one and with two."""
    block = max(0.0, seconds[-1] - seconds[0])  # other work can make one as slow as two
    return seconds[-1] + (layers - len(seconds)) * block
