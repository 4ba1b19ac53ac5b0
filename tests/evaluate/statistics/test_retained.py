"""The student's share of the teacher's score, its interval, and when there is none."""

import math

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics import retained_share


def pairs(n: int, rng: np.random.Generator, teacher=0.7, student=0.55) -> np.ndarray:
    """Correlated answers: the student is right only where the same difficulty allows it."""
    difficulty = rng.random(n)
    noise = rng.normal(0, 0.1, (2, n))
    return (difficulty + noise < np.array([[student], [teacher]])).astype(float)


def test_share_of_the_score_and_of_what_is_above_chance():
    student, teacher = [1, 1, 0, 0, 1] * 20, [1, 1, 1, 0, 1] * 20
    assert retained_share(student, teacher, seed=0).share == pytest.approx(0.75)
    above = retained_share(student, teacher, 0.25, seed=0)
    assert above.share == pytest.approx((0.6 - 0.25) / (0.8 - 0.25))
    assert above.interval.low < above.share < above.interval.high
    each = retained_share(student, teacher, [0.25] * 50 + [0.5] * 50, seed=0)
    assert each.share == pytest.approx((0.6 - 0.375) / (0.8 - 0.375))


def test_interval_is_near_fiellers():
    """Fieller's interval (1954): all r with |S - r T| <= z sqrt(var(S - r T))."""
    student, teacher = pairs(600, np.random.default_rng(0)) - 0.25
    found = retained_share(student, teacher, seed=1).interval
    shares = np.linspace(0.3, 1.5, 20_001)
    rest = student.mean() - shares * teacher.mean()
    (ss, st), (_, tt) = np.cov(student, teacher) / 600
    held = shares[rest**2 <= 3.8415 * (ss - 2 * shares * st + shares**2 * tt)]
    assert (found.low, found.high) == pytest.approx((held[0], held[-1]), abs=0.015)


def test_interval_holds_the_true_share():
    rng = np.random.default_rng(2)
    population = pairs(400_000, rng).mean(axis=1)
    true = (population[0] - 0.25) / (population[1] - 0.25)
    held = [
        retained_share(*pairs(300, rng), 0.25, seed=0, num_resamples=400).interval.contains(true)
        for _ in range(400)
    ]
    assert np.mean(held) >= 0.925


def test_no_share_if_the_teacher_is_at_chance():
    rng = np.random.default_rng(3)
    guesses = (rng.random((2, 100)) < 0.25).astype(float)
    assert retained_share(*guesses, 0.25, seed=0) is None
    right = [1] * 30 + [0] * 70
    assert retained_share(right, right, 0.25, seed=0) is None  # 0.05 above, error 0.046
    assert retained_share(right, right, 0.2099, seed=0) is None  # 1.956 standard errors above
    assert retained_share(right, right, 0.2, seed=0).share == pytest.approx(1)
    assert retained_share([0, 0], [0, 0], seed=0) is None
    assert retained_share([1], [1], seed=0) is None


def test_a_student_below_chance_retains_less_than_nothing():
    found = retained_share([0] * 90 + [1] * 10, [1] * 60 + [0] * 40, 0.25, seed=0)
    assert found.share == pytest.approx(-0.15 / 0.35)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "student: there is no item"),
        (([1, 0], [1, math.nan]), "teacher: item 1 is nan"),
        (([1, 0], [1]), "student has 2 items and teacher has 1"),
        (([1, 0], [1, 1], [0.25]), "chance has 1"),
        (([1, 0], [1, 1], math.nan), "chance: item 0 is nan"),
    ],
)
def test_what_cannot_be_divided_is_said(arguments, message):
    with pytest.raises(XinslmError, match=message):
        retained_share(*arguments, seed=0)
