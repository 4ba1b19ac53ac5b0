"""Fit the linears of a model one layer after another, each to the inputs that the fitted ones give
(GPTQ's "true sequential" order), for exports that choose codes of their own.

Within a layer the order is q, k, v -> o -> gate, up -> down, as in `pipeline.py`, which also
continues stopped runs and writes as it goes. Here one layer is in memory in float32, and what `fit`
keeps; activations are in files of a temporary folder.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from xinslm.data.packing import Batch
from xinslm.errors import XinslmError
from xinslm.model.source import TABLE, ModelSource
from xinslm.progress import Listener, Progress
from xinslm.quantize.activations import Blocks, Calibration, load_blocks
from xinslm.quantize.gptq import Factor, factorise
from xinslm.quantize.pipeline import LINEARS


class Fit(Protocol):
    """Chooses the codes of one weight and keeps them."""

    def __call__(self, name: str, weight: Tensor, factor: Factor | None) -> Tensor:
        """The stored values for float32 weights (rows, columns); no factor without calibration, or
        if the inputs' Hessian cannot be inverted.
        """


@dataclass(frozen=True)
class Walk:
    """What the layers are fitted with."""

    source: ModelSource
    shapes: Mapping[str, tuple[int, ...]]
    batches: list[Batch]
    """Calibration rows; none to fit each weight alone."""
    stored_table: Callable[[Tensor], Tensor]
    """From the embedding to its stored values."""
    stage: str
    """Name of the stage in progress events."""


@torch.no_grad()
def fit_linears(walk: Walk, fit: Fit, on_progress: Listener) -> None:
    """Call `fit` for each linear weight of the layers, in order.

    XinslmError if activations are not finite.
    """
    source, count = walk.source, walk.source.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        calibration = None
        if walk.batches:
            calibration = Calibration(source.config, walk.batches, Path(folder), with_original=True)
            _begin(calibration, walk)
        for index in range(count):
            on_progress(Progress(walk.stage, index, count, "layers"))
            prefix = f"model.layers.{index}."
            _fit_layer(load_blocks(source, walk.shapes, index), prefix, fit, calibration)
            if calibration is not None:
                calibration.finish_layer()
                calibration.forget_before(index + 1)
    on_progress(Progress(walk.stage, count, count, "layers"))


def _begin(calibration: Calibration, walk: Walk) -> None:
    """Write the rows' embeddings: those that are stored, and those before."""
    original = walk.source.rows(TABLE, walk.shapes[TABLE])
    calibration.begin()
    tables = (walk.stored_table(original), original)
    for stream, table in zip(calibration.streams, tables, strict=True):
        for index, batch in enumerate(walk.batches):
            stream.states.write(index, table[torch.from_numpy(batch.input_ids)])


def _fit_layer(blocks: Blocks, prefix: str, fit: Fit, calibration: Calibration | None) -> None:
    """Fit one block's linears and put the stored values in place."""
    for part, groups in LINEARS.items():
        half = blocks.quantized.get_submodule(part)
        for group in groups:
            factor = None
            if calibration is not None:
                is_last = group == groups[-1]
                hessian = calibration.hessian(blocks, part, group[0], is_last)
                if not hessian.is_finite:
                    raise XinslmError(
                        f"on the calibration text, the inputs of {prefix}{part}.{group[0]} are "
                        "NaN, infinite or too large to square in float32: leave out --data-path"
                    )
                factor = factorise(hessian.mean(), hessian.drift())
            for stem in group:
                linear = cast(nn.Linear, half.get_submodule(stem))
                stored = fit(f"{prefix}{part}.{stem}.weight", linear.weight.data, factor)
                linear.weight = nn.Parameter(stored)
        if calibration is not None:
            calibration.advance(blocks, part, groups[-1][-1])
