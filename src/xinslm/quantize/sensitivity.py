"""Which weights to store in 8 bits, so that a model fits a number of bytes with the least loss.

What 4 bits in one weight matrix cost is estimated at the original model: the KL divergence of the
changed model's predictions is half the Fisher information along the change, (g . E)^2, with E the
weights' error and g the gradient of the log-likelihood of tokens drawn from the model's own
predictions (as in Kunstner et al., arXiv:1905.12558, section 2). One backward pass over a row gives
a sample for every matrix at once. Estimates of different matrices are added, as if their errors had
nothing to do with each other.

    costs = measure_costs(source, quantized, batches, seed=0)
    wide = choose_wide(costs, budget=80_000_000)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xinslm.data.packing import Batch
from xinslm.errors import UsageError
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import fused_loss
from xinslm.model.grids import BLOCK, GRIDS, Q4_0, Q8_0, Grid, encode, fit_scales
from xinslm.model.quantized import QuantizedSource
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.model.stored import StoredWeight
from xinslm.progress import Listener, Progress, ignore
from xinslm.quantize.rows import hidden_states, require_finite, single_rows

_MAX_ROWS = 64
_STAGE = "measure sensitivity"
_LIKELIHOOD = LossConfig(alpha=1.0, beta=0.0)


@dataclass(frozen=True)
class Cost:
    """What one weight matrix takes and loses."""

    weights: int
    divergence: float
    """KL divergence that its 4-bit codes add, nats per token, estimated."""

    @property
    def extra_bytes(self) -> int:
        """Bytes that 8 bits take more than 4."""
        return self.weights // BLOCK * (Q8_0.block_bytes - Q4_0.block_bytes)


def fit(weight: Tensor, grid: Grid) -> StoredWeight:
    """Round float32 weights (rows, columns) to the nearest codes of a grid."""
    scales = fit_scales(weight, grid)
    stored = StoredWeight.of(encode(weight, scales, grid), scales, grid)
    assert stored is not None, "fitted scales and codes are those of the grid"
    return stored


def measure_costs(
    source: ModelSource,
    quantized: QuantizedSource,
    batches: list[Batch],
    seed: int,
    on_progress: Listener = ignore,
) -> dict[str, Cost]:
    """Estimate the cost of 4 bits for each weight matrix with codes, by name without '.weight'.

    `quantized` gives the 4-bit codes; a matrix that has 8 bits there (the embedding) is rounded to
    4 bits. At most 64 rows are used. Memory holds the model in float32 and one gradient.
    """
    model = source.transformer().requires_grad_(False).train()
    narrow = _narrow(source, quantized)
    sums = dict.fromkeys(narrow, 0.0)
    inner: dict[str, float] = {}

    def add_inner_product(stem: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None, "the hook runs after the gradient is there"
        stored = narrow[stem] or quantized.stored(f"{stem}.weight")
        error = stored.dequantize().sub_(parameter.detach())
        inner[stem] = float((parameter.grad * error).double().sum())
        parameter.grad = None

    for stem in narrow:
        weight = model.get_parameter(f"{stem}.weight").requires_grad_(True)
        weight.register_post_accumulate_grad_hook(
            lambda parameter, stem=stem: add_inner_product(stem, parameter)
        )
    rows = single_rows(batches)[:_MAX_ROWS]
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    for done, row in enumerate(rows):
        on_progress(Progress(_STAGE, done, len(rows), "rows"))
        hidden = hidden_states(model, row)
        labels = _draw(source, model, hidden.detach(), generator)
        loss, _ = fused_loss(hidden, model.head_weight, labels, None, _LIKELIHOOD, 1.0)
        loss.backward()
        for stem, value in inner.items():
            sums[stem] += value * value
        tokens += len(labels)
    on_progress(Progress(_STAGE, len(rows), len(rows), "rows"))
    sizes = {stem: model.get_parameter(f"{stem}.weight").numel() for stem in narrow}
    return {stem: Cost(sizes[stem], 0.5 * sums[stem] / tokens) for stem in narrow}


def choose_wide(costs: dict[str, Cost], fixed_bytes: int, budget: int) -> list[str]:
    """Names of the matrices that get 8 bits: the largest gain per byte first, while they fit.

    `fixed_bytes` is what the weights without codes take. UsageError if the model does not fit into
    `budget` bytes with all matrices at 4 bits.
    """
    total = fixed_bytes + sum(cost.weights // BLOCK * Q4_0.block_bytes for cost in costs.values())
    if total > budget:
        raise UsageError(
            f"--target-size is {budget:,} bytes, but the weights take {total:,} with 4 bits in "
            "every matrix: raise it, or prune the model first (`xinslm prune`)"
        )
    order = sorted(costs, key=lambda stem: -costs[stem].divergence / costs[stem].extra_bytes)
    wide = []
    for stem in order:
        if total + costs[stem].extra_bytes <= budget:
            total += costs[stem].extra_bytes
            wide.append(stem)
    return wide


def replacements(
    source: ModelSource, quantized: QuantizedSource, costs: dict[str, Cost], wide: list[str]
) -> dict[str, StoredWeight]:
    """The weights whose number of bits changes, by name without '.weight'."""
    shapes, changed = weight_shapes(source.config), {}
    for stem in costs:
        name, grid = f"{stem}.weight", Q8_0 if stem in wide else Q4_0
        if quantized.formats[name] != grid.name:
            changed[stem] = fit(source.rows(name, shapes[name]), grid)
    return changed


def _narrow(source: ModelSource, quantized: QuantizedSource) -> dict[str, StoredWeight | None]:
    """Every weight with codes; its 4-bit form where `quantized` has another."""
    shapes = weight_shapes(source.config)
    return {
        name.removesuffix(".weight"): (
            None if kind == Q4_0.name else fit(source.rows(name, shapes[name]), Q4_0)
        )
        for name, kind in quantized.formats.items()
        if kind in GRIDS
    }


@torch.no_grad()
def _draw(source: ModelSource, model: Any, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Next tokens (n,) drawn from the model's predictions, for hidden states (n, hidden)."""
    drawn = []
    for rows in hidden.split(128):
        logits = model.logits(rows)
        require_finite(source, logits, "--target-size")
        drawn.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
    return torch.cat(drawn)
