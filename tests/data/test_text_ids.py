"""Texts are recognized by their plain tokens: whole, or as the beginning of a longer one."""

import numpy as np
import pytest

from xinslm.data.dataset import Split
from xinslm.data.text_ids import LONG, KnownTexts, document_ids, plain_tokens, text_id

SPECIAL = [0, 1]


def split_of(documents, masks=None):
    tokens = np.concatenate([np.array(d, np.uint16) for d in documents])
    mask = np.ones(len(tokens), np.uint8) if masks is None else np.concatenate(masks)
    ends = np.cumsum([0, *map(len, documents)])
    return Split(tokens, mask.astype(np.uint8), ends, np.ones(len(documents), np.int64), 9, "train")


def test_the_documents_of_positions_are_found():
    documents = [[0, 5, 6, 1], [], [0, 7, 1], [0, 8, 8, 8, 1]]
    split = split_of(documents)
    expected = {i: text_id(np.array([t for t in d if t > 1])) for i, d in enumerate(documents)}
    for position, document in {0: 0, 3: 0, 4: 2, 6: 2, 7: 3, 11: 3}.items():
        assert document_ids(split, np.array([position]), SPECIAL) == [expected[document]]
    everything = document_ids(split, np.arange(12), SPECIAL)
    assert everything == sorted(expected[i] for i in (0, 2, 3))


def test_tokens_after_the_last_target_do_not_count():
    """As in a chat whose template puts a line break behind the last answer."""
    split = split_of([[0, 5, 6, 7, 1, 8]], [[0, 0, 0, 1, 1, 0]])
    assert document_ids(split, np.array([2]), SPECIAL) == [text_id(np.array([5, 6, 7]))]


@pytest.mark.parametrize("length", [3, LONG - 1, LONG, 300])
def test_a_long_text_is_known_by_its_beginning_and_a_short_one_is_not(length):
    text = np.random.default_rng(0).integers(2, 900, 400)
    known = KnownTexts([text_id(text[:length]), text_id(text[5:9])])
    assert known.holds(text[:length])
    assert known.holds(text) == (length >= LONG)
    assert not known.holds(text[: length - 1])
    other = text.copy()
    other[length - 1] += 1
    assert not known.holds(other)


def test_what_is_no_id_is_left_out():
    assert not KnownTexts(["", "x-0", "12", "3-0123456789abcde", "-1-0123456789abcdef"])


def test_types_of_ids_do_not_matter():
    tokens = [0, 300, 5, 1]
    narrow, wide = (plain_tokens(np.array(tokens, t), SPECIAL) for t in (np.uint16, np.int64))
    assert text_id(narrow) == text_id(wide)
