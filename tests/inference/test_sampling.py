"""Sampling against closed forms, a brute force, and transformers' logits processors in our
order.
"""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xinslm.errors import UsageError
from xinslm.inference.sampling import Sampler, log_probability
from xinslm.sampling import Sampling

PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def sampler(**changes) -> Sampler:
    return Sampler(dataclasses.replace(PLAIN, **changes))


def full(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """The distribution over the whole vocabulary."""
    tokens, probabilities = sampler.distribution(logits)
    result = np.zeros(len(logits))
    result[tokens] = probabilities
    return result


def random_logits(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.5, size).astype(np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"temperature": 0.3},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 1000, "top_p": 0.01},
        {"top_k": 5, "top_p": 0.99},
    ],
)
def test_equal_to_transformers_in_our_order(changes: dict) -> None:
    s = dataclasses.replace(PLAIN, **changes)
    warpers = LogitsProcessorList()
    if s.top_k:
        warpers.append(TopKLogitsWarper(min(s.top_k, 50)))
    if s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        warpers.append(MinPLogitsWarper(s.min_p))
    warpers.append(TemperatureLogitsWarper(s.temperature))
    for seed in range(50):
        logits = random_logits(seed)
        expected = warpers(None, torch.from_numpy(logits)[None].double())[0].softmax(-1).numpy()
        np.testing.assert_allclose(full(Sampler(s), logits), expected, atol=1e-9)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float) -> None:
    for seed in range(30):
        logits = random_logits(seed, 12)
        probabilities = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
        best = None  # brute force over all 4,095 sets
        for bits in range(1, 1 << 12):
            members = [i for i in range(12) if bits >> i & 1]
            mass = probabilities[members].sum()
            if mass >= top_p:
                rank = (len(members), -mass)
                best = min(best or (rank, members), (rank, members))
        kept = np.flatnonzero(full(sampler(top_p=top_p), logits))
        assert best is not None and kept.tolist() == best[1]


def test_nucleus_keeps_the_token_that_reaches_the_bound_exactly() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    assert np.count_nonzero(full(sampler(top_p=0.5), logits)) == 1
    assert np.count_nonzero(full(sampler(top_p=0.75), logits)) == 2
    assert np.count_nonzero(full(sampler(top_p=0.76), logits)) == 3


def test_min_p_keeps_what_reaches_its_share_of_the_best() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(
        full(sampler(min_p=0.5), logits), [4 / 9, 3 / 9, 2 / 9, 0], atol=1e-12
    )
    np.testing.assert_allclose(full(sampler(min_p=1.0), logits), [1, 0, 0, 0])


def test_temperature_reshapes_only_what_the_filters_kept() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    np.testing.assert_allclose(
        full(sampler(top_k=2, temperature=2.0), logits), [0.5635, 0.4365, 0], atol=1e-4
    )
    # a filter after the temperature would keep all three
    hot = full(sampler(top_p=0.6, temperature=100.0), logits)
    assert np.count_nonzero(hot) == 2


def test_equal_logits_go_by_id_and_top_k_keeps_exactly_k() -> None:
    logits = np.array([1.0, 3.0, 3.0, 3.0, 0.0])
    assert np.flatnonzero(full(sampler(top_k=2), logits)).tolist() == [1, 2]
    assert sampler(temperature=0.0).draw(logits) == 1


@pytest.mark.parametrize("changes", [{}, {"top_k": 6, "temperature": 1.5}, {"top_p": 0.8}])
def test_draws_follow_the_distribution(changes: dict) -> None:
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0], np.float32)
    s = sampler(**changes)
    expected = full(s, logits)
    count = 20_000
    drawn = np.bincount([s.draw(logits) for _ in range(count)], minlength=8)
    assert (drawn[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((drawn - count * expected)[kept] ** 2 / (count * expected[kept])).sum()
    # mean k - 1, standard deviation sqrt(2 (k - 1)); 4.5 deviations are a chance of about 1e-5
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5


def test_a_seed_fixes_the_draws() -> None:
    def draws(seed: int | None) -> list[int]:
        s = sampler(seed=seed)
        return [s.draw(random_logits(i)) for i in range(40)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_huge_logits_overflow_nothing() -> None:
    logits = np.array([3e4, 3e4 - 1, -3e4], np.float32)
    np.testing.assert_allclose(full(sampler(), logits), [0.7310586, 0.2689414, 0], atol=1e-6)
    assert log_probability(logits, 1) == pytest.approx(-1.3132617, abs=1e-6)


def test_log_probability_ignores_the_filters() -> None:
    logits = random_logits(1)
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    assert log_probability(logits, 7) == pytest.approx(expected[7].item(), abs=1e-9)


def test_all_impossible_settings_are_named() -> None:
    settings = Sampling(temperature=-1.0, top_k=-1, top_p=0.0, min_p=2.0, seed=-1)
    with pytest.raises(UsageError) as error:
        Sampler(settings)
    assert all(
        name in str(error.value) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
    )
    with pytest.raises(UsageError, match="temperature is nan"):
        Sampler(Sampling(temperature=float("nan")))


@pytest.mark.parametrize("penalty", [1.2, 0.8])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits, seen = random_logits(4), [3, 7, 7, 20, 41]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([seen]), torch.from_numpy(logits)[None].clone())[0]
    found = sampler(repetition_penalty=penalty).distribution(logits, seen)
    probabilities = np.zeros(50)
    probabilities[found[0]] = found[1]
    np.testing.assert_allclose(probabilities, expected.double().softmax(0), rtol=1e-6)
    assert (logits == random_logits(4)).all()  # the caller's logits are left alone
