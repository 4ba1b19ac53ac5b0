"""Calibration rows one at a time, through a whole model."""

import torch
from torch import Tensor

from xinslm.data.packing import Batch
from xinslm.errors import XinslmError
from xinslm.model.finite import all_finite
from xinslm.model.source import ModelSource
from xinslm.model.transformer import Transformer


def single_rows(batches: list[Batch]) -> list[Batch]:
    """The rows of all batches, each as a batch of one."""
    return [
        Batch(*(array[i : i + 1] for array in vars(batch).values()))
        for batch in batches
        for i in range(len(batch.input_ids))
    ]


def hidden_states(model: Transformer, row: Batch) -> Tensor:
    """Last hidden states (n, hidden) of a row's n positions without padding."""
    ids, positions, segments = (
        torch.from_numpy(array) for array in (row.input_ids, row.positions, row.segments)
    )
    hidden: Tensor = model.hidden(ids, positions, segments)
    return hidden[segments >= 0]


def require_finite(source: ModelSource, values: Tensor, option: str) -> None:
    """Raise XinslmError unless what an option of `quantize` measures of predictions is finite."""
    if not all_finite(values):
        raise XinslmError(
            f"{source.path}: on the calibration text, predictions are NaN or infinite, and "
            f"{option} measures them. The model is broken in its last norm or LM head, or needs "
            "other text"
        )
