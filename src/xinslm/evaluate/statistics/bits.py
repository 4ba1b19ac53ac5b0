"""Bits per byte of the right answers: how surprised a model is by them, whatever its tokenizer.

Accuracy asks whether the right answer beats the wrong ones; this measure changes with every
improvement, so it tells small models apart that are at chance.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.bootstrap import (
    NUM_RESAMPLES,
    bootstrap_means,
    percentile_interval,
)
from xinslm.evaluate.statistics.checks import finite_array, require_population, require_same_items
from xinslm.evaluate.statistics.intervals import Interval


@dataclass(frozen=True)
class BitsPerByte:
    """Total bits divided by total bytes."""

    value: float
    generalisation_interval: Interval | None
    """For all items of this kind: bootstrap over the items, 95 % by default; None with one item."""
    full_set_interval: Interval | None
    """For the full set, of which the items are a random sample; no width if it was scored fully.
    None with one item of several.
    """
    num_items: int
    num_bytes: int


def bits_per_byte(
    log_likelihoods: ArrayLike,
    num_bytes: ArrayLike,
    population: int | None = None,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> BitsPerByte:
    """-sum ll_i / (ln 2 sum bytes_i), with intervals.

    Args:
        log_likelihoods: of the right answer of each item, in nats.
        num_bytes: UTF-8 bytes of each of these answers, at least 1.
        population: items of the full set; None if all were scored.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.
        confidence: of both intervals.

    The interval for the full set has sqrt(1 - n/N) times the distances from the value, the
    finite-population correction of a ratio (Cochran 1977, chapter 6).
    """
    nats = finite_array(log_likelihoods, "log_likelihoods")
    sizes = finite_array(num_bytes, "num_bytes")
    require_same_items([nats, sizes], ["log_likelihoods", "num_bytes"])
    if (nats > 0).any():
        raise XinslmError(
            f"log_likelihoods: {nats.max()} is above 0, no logarithm of a probability"
        )
    if (sizes < 1).any():
        item = int(np.argmax(sizes < 1))
        raise XinslmError(f"num_bytes: item {item} has {sizes[item]:g} bytes; at least 1 is needed")
    population = len(nats) if population is None else population
    require_population(len(nats), population)
    value = float(-nats.sum() / sizes.sum()) / math.log(2)
    spread, full = None, Interval(value, value)
    if len(nats) > 1:
        means = bootstrap_means(np.stack([-nats / math.log(2), sizes], axis=1), seed, num_resamples)
        spread = percentile_interval(means[:, 0] / means[:, 1], len(nats), confidence)
        part = math.sqrt(1 - len(nats) / population)
        full = Interval(value - part * (value - spread.low), value + part * (spread.high - value))
    return BitsPerByte(
        value=value,
        generalisation_interval=spread,
        full_set_interval=full if spread is not None or population == 1 else None,
        num_items=len(nats),
        num_bytes=int(sizes.sum()),
    )
