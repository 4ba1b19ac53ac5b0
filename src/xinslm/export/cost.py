"""What an export that chooses codes anew costs: squared error of the weights, and divergence on
held-out text.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xinslm.data.dataset import open_dataset
from xinslm.data.packing import Batch, PackedDataset
from xinslm.errors import UsageError
from xinslm.model.source import ModelSource
from xinslm.model.transformer import Transformer
from xinslm.progress import Listener, Progress
from xinslm.quantize.rows import hidden_states

HELD_OUT_ROWS = 16
"""Rows of the validation split that the divergence is measured on."""
ROW_TOKENS = 512
"""Tokens of a row, of calibration and of validation, of models with a longer context."""
_STAGE = "measure"
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Divergence:
    """Of the exported weights' next-token distributions from those of the model."""

    kl: float
    """KL divergence, nats a token."""
    same: float
    """Share of the tokens with the same most likely one."""
    tokens: int


@dataclass(frozen=True)
class Cost:
    """What was measured."""

    errors: Mapping[str, float]
    """By weight: squared error over the squared weights."""
    kinds: Mapping[str, str]
    """By weight: what it became, such as 'palettes of 4 bits'."""
    divergence: Divergence | None = None
    text: str = ""
    """Name of the dataset that the divergence was measured on."""
    was_quantized: bool = False
    """Whether the model had codes, so that all is relative to weights that were rounded before."""

    def describe(self) -> list[str]:
        """Sentences for the terminal and the model card."""
        what = "the quantized weights" if self.was_quantized else "the unquantized weights"
        lines = []
        for kind in sorted(set(self.kinds.values())):
            found = {n: e for n, e in self.errors.items() if self.kinds[n] == kind}
            worst = max(found, key=lambda name: found[name])
            mean = sum(found.values()) / len(found)
            lines.append(
                f"{len(found)} {kind}: squared error {mean:.2e} of {what} squared "
                f"on average, at most {found[worst]:.2e} ({worst})"
            )
        if self.divergence is not None:
            lines.append(
                f"KL divergence from {what} {self.divergence.kl:.4f} nats a token, same most "
                f"likely token at {self.divergence.same:.1%}: {self.divergence.tokens:,} held-out "
                f"tokens of {self.text}"
            )
        return lines


def held_out_rows(data: Path, length: int) -> list[Batch]:
    """Rows of the validation split, one a batch; UsageError if it has none."""
    rows = PackedDataset(open_dataset(data).split("validation"), length)
    if not len(rows):
        raise UsageError(f"{data} has no validation split to measure on: prepare it with one")
    return [rows.batch(np.array([i])) for i in range(min(HELD_OUT_ROWS, len(rows)))]


def squared_error(stored: Tensor, weight: Tensor) -> float:
    """Squared error over the squared weights."""
    error = (stored - weight).square().sum(dtype=torch.float64)
    return float(error / weight.square().sum(dtype=torch.float64).clamp(min=1e-30))


@torch.no_grad()
def divergence(
    source: ModelSource,
    stored: Iterable[tuple[str, Tensor]],
    rows: list[Batch],
    on_progress: Listener,
) -> Divergence:
    """KL divergence of the model with the `stored` weights, by name, from the model, both computed
    in float32. Memory: 4 bytes a weight.
    """
    model = source.transformer()
    before = list(_states(model, rows, 0, on_progress))
    head = model.head_weight.detach()
    for name, weight in stored:
        # not in place: the parameters may be the source's own map of its file
        model.get_parameter(name).data = weight.float()
    kl = same = 0.0
    tokens = 0
    for expected, found in zip(before, _states(model, rows, len(rows), on_progress), strict=True):
        for p_states, q_states in zip(
            expected.split(_CHUNK_ROWS), found.split(_CHUNK_ROWS), strict=True
        ):
            p, q = (p_states @ head.T).log_softmax(-1), model.logits(q_states).log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(expected)
    on_progress(Progress(_STAGE, 2 * len(rows), 2 * len(rows), "rows"))
    assert math.isfinite(kl), "float32 logits of finite weights"
    return Divergence(kl / tokens, same / tokens, tokens)


def _states(
    model: Transformer, rows: list[Batch], done: int, on_progress: Listener
) -> Iterator[Tensor]:
    for index, row in enumerate(rows):
        on_progress(Progress(_STAGE, done + index, 2 * len(rows), "rows"))
        yield hidden_states(model, row)
