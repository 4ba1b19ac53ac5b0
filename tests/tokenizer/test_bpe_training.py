"""Learning merges, against Hugging Face's trainer and a recount by brute force."""

import weakref
from collections import Counter

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from xinslm.errors import UsageError, XinslmError
from xinslm.tokenizer import BPETokenizer

SPECIALS = 4


def trained(texts, vocab_size, **options):
    tokenizer = BPETokenizer(vocab_size=vocab_size, **options)
    tokenizer.train(texts)
    return tokenizer


@pytest.fixture(params=["auto", "off"])
def native_or_not(request, monkeypatch):
    """With the native library, if there is one, and without."""
    monkeypatch.setenv("XINSLM_NATIVE", request.param)


def same(tokenizer, model):
    assert tokenizer.merges == [tuple(merge) for merge in model["merges"]]
    assert tokenizer.definition.vocab == model["vocab"]


@pytest.mark.parametrize("num_tokens", [256, 257, 300, 700, 2000])
def test_merges_and_ids_are_those_of_hugging_face(prose, hf_trained, num_tokens, native_or_not):
    same(trained(prose, num_tokens + SPECIALS), hf_trained(prose, num_tokens))


@pytest.mark.parametrize("min_frequency", [2, 5])
def test_rare_pairs_are_not_merged(prose, hf_trained, min_frequency):
    ours = trained(prose, 30_000, min_frequency=min_frequency)
    same(ours, hf_trained(prose, 30_000 - SPECIALS, min_frequency))
    assert ours.vocab_size < trained(prose, 30_000).vocab_size


@pytest.mark.parametrize(
    ("corpus", "num_tokens"),
    [
        ("shakespeare", 1000),
        ("shakespeare", 8192),
        ("stories", 4092),
        ("stories", 512),
        ("peps", 6000),
    ],
)
def test_real_texts(corpora, hf_trained, corpus, num_tokens):
    texts = corpora[corpus]
    ours = trained(iter(texts), num_tokens + SPECIALS)
    same(ours, hf_trained(texts, num_tokens))
    joined = [left + right for left, right in ours.merges]
    assert len(set(joined)) == len(joined)  # no string is made twice


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab c", max_size=60), min_size=1, max_size=20), st.integers(0, 300))
def test_few_letters_make_every_kind_of_tie_and_overlap(hf_trained, texts, more):
    texts = [*texts, "abab aaaa"]
    expected = hf_trained(texts, 256 + more)
    for mode in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XINSLM_NATIVE", mode)
            same(trained(texts, 256 + more + SPECIALS), expected)


def test_the_first_merge_is_the_most_frequent_pair(prose):
    pattern = regex.compile(r"[^\r\n\p{L}\p{N}]?\p{L}+")
    counts = Counter()
    for text in prose:
        for word in pattern.findall(text):
            counts.update(zip(word.encode(), word.encode()[1:], strict=False))
    left, right = trained(prose, 256 + 1 + SPECIALS).merges[0]
    best = counts.most_common(1)[0]
    assert bytes(best[0]).decode().replace(" ", "Ġ") == left + right


def test_counts_do_not_overflow_32_bits():
    """Traps 1 and 2: a pair that occurs four thousand million times, counted without holding its
    text.
    """
    from xinslm.tokenizer.learn import MergeLearner

    learner = MergeLearner(Counter({b"ab": 3, b"cd": 2**32 + 1, b"ce": 2**31}), 0, None)
    list(learner.run(256 + 3))
    assert learner.merges == [("c", "d"), ("c", "e"), ("a", "b")]


def test_texts_are_a_stream_that_is_read_once(prose):
    seen = []

    def stream():
        for text in prose:
            seen.append(len(text))
            yield text

    assert trained(stream(), 400).merges == trained(prose, 400).merges
    assert len(seen) == len(prose)


class Text(str):
    """A text that can be asked whether it is still there."""


def test_texts_are_counted_and_dropped(native_or_not):
    """Trap 2: the text of 40 MB is not held; the library takes it in parts of 16 MB."""
    held, most = [], 0

    def stream():
        nonlocal most
        for _ in range(40):
            text = Text(("x" * 999 + " ") * 1000)
            held.append(weakref.ref(text))
            yield text
            del text
            most = max(most, sum(ref() is not None for ref in held))

    assert trained(stream(), 300).vocab_size > 256 + SPECIALS
    assert most < 20


def test_a_long_text_gives_the_same_pieces_as_a_short_one():
    """Above a million characters pieces are found one by one."""
    text = "to be or not to be, that is the question " * 30_000
    assert trained([text], 320).merges == trained([text[: len(text) // 30]], 320).merges


def test_longest_token_is_in_bytes():
    """Trap 6: a cap that holds for characters of several bytes, too."""
    texts = [" " * 64 + "x", "éééééééé" * 4, "internationalization " * 5] * 3
    limited = trained(texts, 500, max_token_length=8)
    lengths = [len(limited.token_bytes(t)) for t in range(limited.vocab_size - SPECIALS)]
    assert max(lengths) == 8
    free = trained(texts, 500)
    assert max(len(free.token_bytes(t)) for t in range(free.vocab_size - SPECIALS)) > 16
    assert trained(texts, 500, max_token_length=1000).merges == free.merges


def test_progress_is_reported(prose):
    seen = []
    BPETokenizer(vocab_size=800).train(prose, seen.append)
    merges = [p for p in seen if p.stage == "learn merges"]
    assert merges[-1].done == merges[-1].total == 800 - SPECIALS - 256
    assert [p.done for p in merges] == sorted(p.done for p in merges)


def test_small_text_gives_a_small_vocabulary():
    assert trained(["ab ab"], 1000).vocab_size == 256 + 2 + SPECIALS


def test_lone_surrogates_are_trained_as_replacement_characters():
    assert trained(["x\ud800"] * 3, 300).merges == trained(["x\ufffd"] * 3, 300).merges


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 259}, "need 260"),
        ({"vocab_size": 300, "split": "gpt-4"}, "choose one of llama-bpe"),
        ({"vocab_size": 300, "special_tokens": ("<a>", "<a>")}, "must differ"),
        ({"vocab_size": 300, "max_token_length": 1}, "at least 2"),
    ],
)
def test_impossible_requests(options, message):
    with pytest.raises(UsageError, match=message):
        BPETokenizer(**options)


def test_no_text_and_a_bare_string_are_refused():
    with pytest.raises(XinslmError, match="no text"):
        BPETokenizer(300).train(["", ""])
    with pytest.raises(UsageError, match=r"pass \[text\]"):
        BPETokenizer(300).train("some text")
