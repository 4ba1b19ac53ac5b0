import hashlib

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from xinslm.data.holdout import draw_number, plan_holdout


def draws_of(count, seed=0):
    return np.array([draw_number(str(i).encode(), seed) for i in range(count)])


# from stories to books: the exponent is drawn, so that a few documents hold most of the text
LENGTHS = st.lists(
    st.floats(1, 6).map(lambda x: int(10**x)) | st.integers(1, 3000), min_size=1, max_size=120
)


@given(LENGTHS, st.floats(0.01, 0.6), st.integers(0, 99))
def test_the_share_holds_for_any_lengths_of_texts(lengths, fraction, seed):
    lengths, draws = np.array(lengths), draws_of(len(lengths), seed)
    total = lengths.sum()
    # documents of fewer than 256 tokens are not cut, so they must be small parts of the share
    assume(fraction * total > 512)
    tails = plan_holdout(lengths, draws, np.ones(len(lengths), bool), fraction)
    assert (tails >= 0).all() and (tails <= lengths).all()
    assert abs(tails.sum() / total - fraction) <= 0.5 * fraction + 1e-9
    assert 0 < tails.sum() < total
    assert ((tails > 0) & (tails < lengths)).sum() <= 4, "only a few are cut"
    order = np.random.default_rng(seed).permutation(len(lengths))
    again = plan_holdout(lengths[order], draws[order], np.ones(len(lengths), bool), fraction)
    assert np.array_equal(again, tails[order]), "the order of the files does not matter"


@given(LENGTHS, st.data())
def test_chats_are_not_cut_and_a_limit_is_kept(lengths, data):
    lengths, draws = np.array(lengths), draws_of(len(lengths))
    divisible = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    )
    limit = data.draw(st.none() | st.integers(0, int(lengths.sum())))
    tails = plan_holdout(lengths, draws, divisible, 0.05, limit)
    assert all(t in (0, n) for t, n in zip(tails[~divisible], lengths[~divisible], strict=True))
    natural = lengths[draws < 0.05].sum()
    assert limit is None or tails.sum() <= max(limit, natural)
    assert tails.sum() < lengths.sum(), "something is left to train on"


@given(LENGTHS, st.integers(2, 5))
def test_copies_are_treated_alike(lengths, copies):
    assume(0.05 * sum(lengths) > 512)
    lengths, draws = np.array(lengths * copies), np.tile(draws_of(len(lengths)), copies)
    tails = plan_holdout(lengths, draws, np.ones(len(lengths), bool), 0.05)
    assert (tails.reshape(copies, -1) == tails[: len(lengths) // copies]).all()
    assert abs(tails.sum() / lengths.sum() - 0.05) <= 0.025


@pytest.mark.parametrize("fraction", [0.02, 0.1])
def test_many_short_documents_are_held_out_by_their_own_numbers(fraction):
    """So data that is added later moves none of them."""
    lengths, draws = np.full(20_000, 200), draws_of(20_000)
    tails = plan_holdout(lengths, draws, np.ones(20_000, bool), fraction)
    assert np.array_equal(tails > 0, draws < fraction)


def test_a_limit_is_kept_by_documents_that_are_not_cut():
    lengths, divisible = np.array([150] * 20), np.zeros(20, bool)
    for limit, held in ((100, 0), (149, 0), (150, 150), (290, 150), (450, 150)):
        assert plan_holdout(lengths, np.linspace(0.9, 1, 20), divisible, 0.05, limit).sum() == held


def test_the_shorter_of_two_chats_is_held_back():
    for seed in range(20):
        tails = plan_holdout(
            np.array([300_000, 900_000]), draws_of(2, seed), np.zeros(2, bool), 0.05
        )
        assert tails.tolist() == [300_000, 0]


def test_numbers_are_uniform_and_follow_the_seed():
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(20_000)]
    draws = [draw_number(digest, 0) for digest in digests]
    assert all(0 <= draw < 1 for draw in draws)
    for bound in (0.01, 0.05, 0.5):
        share = sum(draw < bound for draw in draws) / len(draws)
        assert abs(share - bound) < 4 * (bound * (1 - bound) / len(draws)) ** 0.5
    assert draws == [draw_number(digest, 0) for digest in digests]
    assert (
        sum(draw_number(digest, 1) == draw for digest, draw in zip(digests, draws, strict=True))
        == 0
    )
