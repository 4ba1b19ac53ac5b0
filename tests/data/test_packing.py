from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xinslm.data.dataset import Split
from xinslm.data.packing import PackedDataset, pack, sequences
from xinslm.errors import UsageError


def make_split(lengths, seed=0, vocab_size=1000):
    rng = np.random.default_rng(seed)
    documents = np.cumsum([0, *lengths], dtype=np.int64)
    total = int(documents[-1])
    return Split(
        tokens=rng.integers(1, vocab_size, total).astype(np.uint16),
        mask=rng.integers(0, 2, total).astype(np.uint8),
        documents=documents,
        document_bytes=np.zeros(len(lengths), np.int64),
        vocab_size=vocab_size,
    )


def story_lengths(count, seed=0, mean=5.3):
    return np.maximum(np.random.default_rng(seed).lognormal(mean, 0.5, count).astype(np.int64), 2)


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 17))
def test_sequences_equal_a_loop(lengths, max_length):
    documents = np.cumsum([0, *lengths])
    expected = []
    for begin, end in pairwise(documents):
        position = begin
        while position < end - 1:
            size = min(max_length, end - 1 - position)
            expected.append((position, size))
            position += size
    starts, sizes = sequences(documents, max_length)
    assert starts.dtype == sizes.dtype == np.int64
    assert list(zip(starts.tolist(), sizes.tolist(), strict=True)) == expected


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 24))
def test_every_prediction_stands_in_the_rows_exactly_once(lengths, row_length):
    split = make_split(lengths)
    rows = PackedDataset(split, row_length)
    batch = rows.batch(np.arange(len(rows)))
    real = batch.stream >= 0
    ends = set((split.documents[1:] - 1).tolist())
    predicting = [i for i in range(len(split.tokens)) if i not in ends]
    assert sorted(batch.stream[real].tolist()) == predicting
    for array in (batch.input_ids, batch.labels, batch.positions, batch.segments, batch.stream):
        assert array.shape == (len(rows), row_length) and array.dtype == np.int64
    next_token = split.tokens[batch.stream[real] + 1].astype(np.int64)
    counts = split.mask[batch.stream[real] + 1] == 1
    assert np.array_equal(batch.labels[real], np.where(counts, next_token, -100))
    assert np.array_equal(batch.input_ids[real], split.tokens[batch.stream[real]])
    assert (batch.labels[~real] == -100).all() and (batch.segments[~real] == -1).all()
    assert (batch.input_ids[~real] == 0).all() and (batch.positions[~real] == 0).all()


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(2, 24))
def test_segments_are_contiguous_runs_of_one_document(lengths, row_length):
    split = make_split(lengths)
    rows = PackedDataset(split, row_length)
    batch = rows.batch(list(range(len(rows))))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for segments, positions, stream in zip(
        batch.segments, batch.positions, batch.stream, strict=True
    ):
        used = int((segments >= 0).sum())
        assert used > 0 and (segments[used:] == -1).all()
        steps = np.diff(segments[:used])
        assert segments[0] == 0 and set(steps.tolist()) <= {0, 1}
        for number in range(segments[used - 1] + 1):
            inside = segments == number
            assert np.array_equal(positions[inside], np.arange(inside.sum()))
            assert np.array_equal(np.diff(stream[inside]), np.ones(inside.sum() - 1))
            assert len(set(document_of[stream[inside]])) == 1


@given(st.lists(st.integers(1, 30), max_size=60))
def test_pack_places_each_sequence_once_and_overfills_no_row(lengths):
    order, offsets = pack(np.array(lengths, np.int64), 30)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    for begin, end in pairwise(offsets):
        row = order[begin:end]
        assert 0 < sum(lengths[i] for i in row) <= 30
        assert list(row) == sorted(row)


@given(st.lists(st.integers(1, 12), max_size=80), st.integers(12, 20))
def test_pack_is_best_fit_decreasing(lengths, row_length):
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(row_length - length)
    order, offsets = pack(np.array(lengths, np.int64), row_length)
    filled = [sum(lengths[i] for i in order[a:b]) for a, b in pairwise(offsets)]
    assert sorted(row_length - f for f in filled) == sorted(spaces)


@pytest.mark.parametrize("row_length", [384, 512, 2048])
def test_story_like_documents_fill_the_rows(row_length):
    rows = PackedDataset(make_split(story_lengths(20_000)), row_length)
    assert rows.fill > 0.97


def test_sequences_shorter_than_the_row():
    split = make_split(story_lengths(5000))
    rows = PackedDataset(split, 1024, max_length=256)
    batch = rows.batch(range(len(rows)))
    assert rows.fill > 0.99 and batch.positions.max() == 255
    assert (batch.stream >= 0).sum() == len(split.tokens) - len(split.document_bytes)


def test_a_million_sequences_take_seconds():
    lengths = np.minimum(story_lengths(1_000_000), 512)
    order, offsets = pack(lengths, 512)
    again = pack(lengths, 512)
    assert np.array_equal(order, again[0]) and np.array_equal(offsets, again[1])


def test_too_long_a_sequence_is_refused():
    with pytest.raises(UsageError, match="31 tokens cannot be packed into rows of 30"):
        pack(np.array([3, 31]), 30)
    with pytest.raises(UsageError, match="at least 1 token"):
        sequences(np.array([0, 3]), 0)


def test_no_documents_give_no_rows():
    rows = PackedDataset(make_split([]), 8)
    assert len(rows) == 0 and rows.fill == 0
    assert rows.batch([]).input_ids.shape == (0, 8)


def test_rows_come_in_the_order_asked_for():
    rows = PackedDataset(make_split([9] * 20), 16)
    all_rows = rows.batch(range(len(rows)))
    some = rows.batch(np.array([3, 1, 3]))
    assert np.array_equal(some.stream, all_rows.stream[[3, 1, 3]])
    assert np.array_equal(some.labels, all_rows.labels[[3, 1, 3]])


def test_a_long_row_costs_what_its_sequences_cost():
    order, offsets = pack(np.array([3, 1, 2]), 10**12)
    assert order.tolist() == [0, 1, 2] and offsets.tolist() == [0, 3]
