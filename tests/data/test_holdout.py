import hashlib

from hypothesis import given
from hypothesis import strategies as st

from xinslm.data.holdout import cut_text, draw_number
from xinslm.data.records import Document


@given(st.text(alphabet="ab \n", min_size=2, max_size=200), st.floats(0.001, 0.999))
def test_a_cut_text_is_whole_and_cut_at_the_nearest_line_end_or_space(text, fraction):
    head, tail = cut_text(Document("f:1", text=text), fraction)
    assert head.text and tail.text and head.text + tail.text == text
    wanted = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    for separator in "\n ":
        places = [i + 1 for i, c in enumerate(text[:-1]) if c == separator]
        if places:
            assert abs(len(head.text) - wanted) == min(abs(place - wanted) for place in places)
            return
    assert len(head.text) == wanted


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
