"""Checks of scores before they are averaged: a NaN or an empty list is an error, not a number."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xinslm.errors import XinslmError

Floats = NDArray[np.float64]


def finite_array(values: ArrayLike, name: str = "scores") -> Floats:
    """One finite number for each item, float64, at least one item; XinslmError otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise XinslmError(f"{name}: one number for each item is needed, not shape {array.shape}")
    if not len(array):
        raise XinslmError(f"{name}: there is no item to average; score at least one")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise XinslmError(
            f"{name}: item {bad[0]} is {array[bad[0]]} ({len(bad)} of {len(array)} items are not "
            "finite); the model's weights are damaged or its numbers overflow"
        )
    return array


def score_array(values: ArrayLike, name: str = "scores") -> Floats:
    """`finite_array` of numbers from 0 to 1."""
    array = finite_array(values, name)
    bad = np.flatnonzero((array < 0) | (array > 1))
    if len(bad):
        raise XinslmError(f"{name}: item {bad[0]} is {array[bad[0]]}; scores are between 0 and 1")
    return array


def right_wrong_array(values: ArrayLike, name: str) -> Floats:
    """`finite_array` of 1 (right) and 0 (wrong)."""
    array = finite_array(values, name)
    if not is_binary(array):
        value = array[(array != 0) & (array != 1)][0]
        raise XinslmError(f"{name}: {value} is neither 1 (right) nor 0 (wrong)")
    return array


def is_binary(scores: Floats) -> bool:
    """Whether each score is 0 or 1."""
    return bool(((scores == 0) | (scores == 1)).all())


def require_same_items(columns: Sequence[Floats], names: Sequence[str]) -> None:
    """XinslmError unless all columns have the same length."""
    for column, name in zip(columns[1:], names[1:], strict=True):
        if len(column) != len(columns[0]):
            raise XinslmError(
                f"{names[0]} has {len(columns[0])} items and {name} has {len(column)}; a paired "
                "comparison needs the scores of the same items in the same order"
            )


def require_population(num_items: int, population: int) -> None:
    """XinslmError if more items were scored than the full set has."""
    if num_items > population:
        raise XinslmError(
            f"{num_items} items were scored, but the full set has {population}; each item of the "
            "full set may be scored once"
        )


def require_confidence(confidence: float) -> None:
    """XinslmError unless the confidence is above 0 and below 1."""
    if not 0 < confidence < 1:
        raise XinslmError(f"confidence {confidence}: choose a number above 0 and below 1")
