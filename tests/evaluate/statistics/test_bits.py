"""Bits per byte of the right answers: totals, not a mean of quotients; both intervals."""

import math

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics import bits_per_byte


def answers(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods and bytes; long answers are easier by the byte."""
    num_bytes = rng.integers(3, 120, n)
    return -rng.gamma(4, 0.25, n) * num_bytes**0.8, num_bytes


def test_it_is_the_quotient_of_the_totals():
    """Eight bits over 2 bytes and two bits over 8 bytes: 1 bit per byte, not (4 + 0.25) / 2."""
    found = bits_per_byte([-8 * math.log(2), -2 * math.log(2)], [2, 8], seed=0)
    assert found.value == pytest.approx(1.0)
    assert (found.num_items, found.num_bytes) == (2, 10)


def test_interval_holds_the_value_of_all_items():
    rng = np.random.default_rng(0)
    nats, num_bytes = answers(400_000, rng)
    true = -nats.sum() / num_bytes.sum() / math.log(2)
    held = []
    for at in range(0, 40_000, 160):
        part = slice(at, at + 160)
        found = bits_per_byte(nats[part], num_bytes[part], seed=0, num_resamples=300)
        held.append(found.generalisation_interval.contains(true))
    assert np.mean(held) >= 0.92


def test_interval_holds_the_value_of_the_full_set():
    rng = np.random.default_rng(1)
    nats, num_bytes = answers(800, rng)
    full = -nats.sum() / num_bytes.sum() / math.log(2)
    held, widths = [], []
    for _ in range(250):
        chosen = rng.choice(800, 500, replace=False)
        found = bits_per_byte(nats[chosen], num_bytes[chosen], 800, seed=0, num_resamples=300)
        held.append(found.full_set_interval.contains(full))
        widths.append(found.full_set_interval.width / found.generalisation_interval.width)
    assert 0.92 <= np.mean(held) < 0.99
    assert widths == pytest.approx([math.sqrt(3 / 8)] * 250)


def test_a_fully_scored_set_is_certain():
    found = bits_per_byte(*answers(50, np.random.default_rng(2)), seed=0)
    assert found.full_set_interval.width == 0 < found.generalisation_interval.width
    assert found.full_set_interval.contains(found.value)


def test_one_item():
    found = bits_per_byte([-1.0], [3], seed=0)
    assert found.value == pytest.approx(1 / 3 / math.log(2))
    assert found.generalisation_interval is None and found.full_set_interval.width == 0
    assert bits_per_byte([-1.0], [3], population=2, seed=0).full_set_interval is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "log_likelihoods: there is no item"),
        (([math.nan], [1]), "item 0 is nan"),
        (([-math.inf], [1]), "item 0 is -inf"),
        (([-1.0, 0.5], [1, 1]), r"0\.5 is above 0"),
        (([-1.0, -1.0], [1, 0]), "item 1 has 0 bytes"),
        (([-1.0, -1.0], [1]), "num_bytes has 1"),
        (([-1.0, -1.0], [1, 1], 1), "full set has 1"),
    ],
)
def test_what_has_no_bits_per_byte_is_said(arguments, message):
    with pytest.raises(XinslmError, match=message):
        bits_per_byte(*arguments, seed=0)
