"""Encoding and decoding, against Hugging Face, a quadratic reference, and the laws a tokenizer
obeys.
"""

import itertools
import json
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from xinslm.errors import XinslmError
from xinslm.native import library, reason
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.alphabet import BYTE_TO_CHAR, SPLITS

TEXT = st.text(st.characters(codec="utf-8"), max_size=120) | st.text(
    "ab '\r\n\t1٣é🙂.", max_size=120
)


@pytest.fixture(scope="module", params=["native", "python"])
def ours(prose, request):
    if request.param == "native" and library() is None:
        pytest.skip(f"the native library is absent: {reason()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XINSLM_NATIVE", "off" if request.param == "python" else "require")
        tokenizer = BPETokenizer(vocab_size=1500)
        tokenizer.train(prose)
        assert (tokenizer._native is None) == (request.param == "python")
    return tokenizer


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ours.save(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def check(ours, theirs, text):
    theirs.encode_special_tokens = True
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == expected
    assert ours.decode(expected) == text


def test_alphabet_is_hugging_faces():
    assert sorted(BYTE_TO_CHAR.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_patterns_are_the_published_ones(patterns):
    for name, pattern in patterns.items():
        assert SPLITS[name].pattern == pattern


def test_tricky_texts(ours, theirs, tricky):
    for text in tricky:
        check(ours, theirs, text)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_any_text_round_trips_and_equals_hugging_face(ours, theirs, text):
    check(ours, theirs, text)


@pytest.mark.parametrize("form", ["{}", "a{}b {}", " {}{}\n{}1", "'{}"])
def test_every_code_point(ours, theirs, form):
    """Traps 8, 9: classes of letters, digits and spaces agree on all that Unicode has assigned."""
    assigned = [
        chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    step = 1 if form == "{}" else 7
    texts = [form.replace("{}", char) for char in assigned[::step]]
    encoded = theirs.encode_batch_fast(texts, add_special_tokens=False)
    ids, offsets = ours.encode_batch(texts)
    for index, encoding in enumerate(encoded):
        assert ids[offsets[index] : offsets[index + 1]].tolist() == encoding.ids, ascii(
            texts[index]
        )


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
def test_split_rules_cut_like_oniguruma(name, patterns, tricky, prose):
    if name == "gpt-2":
        oracle = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        from tokenizers import Regex

        oracle = pre_tokenizers.Split(Regex(patterns[name]), "isolated")
    for text in [*tricky, *prose[:30]]:
        pieces = [text[begin:end] for _, (begin, end) in oracle.pre_tokenize_str(text)]
        assert SPLITS[name].regex.findall(text) == pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("x'ſab", ["x", "'ſ", "ab"]),
        ("a  b", ["a", " ", " b"]),
        ("a \n\n  b", ["a", " \n\n", " ", " b"]),
        ("end.\n\nNew", ["end", ".\n\n", "New"]),
        ("a\u180eb \u200b", ["a", "\u180eb", " \u200b"]),
        ("a\u0085b", ["a", "\u0085b"]),
    ],
)
def test_pieces_by_hand(ours, text, pieces):
    assert ours.pieces(text) == pieces


def reference_merge(tokenizer, data):
    """The definition: join the leftmost pair of the lowest rank until none is left."""
    symbols = [BYTE_TO_CHAR[byte] for byte in data]
    ranks = {merge: rank for rank, merge in enumerate(tokenizer.merges)}
    while True:
        pairs = [(ranks[p], i) for i, p in enumerate(itertools.pairwise(symbols)) if p in ranks]
        if not pairs:
            return [tokenizer.definition.vocab[symbol] for symbol in symbols]
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.text("theinga", min_size=1, max_size=12))
def test_long_and_short_pieces_merge_alike(ours, length, unit):
    """The heap that takes over above 200 bytes gives what the definition gives."""
    piece = (unit * length)[:length].encode()
    assert ours.encode_piece(piece) == reference_merge(ours, piece)


def test_a_hundred_thousand_letters_are_not_quadratic(ours, theirs):
    for text in ("a" * 100_000, "thein" * 20_000, " " * 100_000, "東" * 30_000):
        begin = time.process_time()
        ids = ours.encode(text)
        assert time.process_time() - begin < 5
        assert ids == theirs.encode(text, add_special_tokens=False).ids


def test_pieces_that_fall_out_of_the_table_are_encoded_again(ours, monkeypatch):
    from xinslm.tokenizer import merges

    monkeypatch.setattr(merges, "_CACHE_ENTRIES", 3)
    monkeypatch.setenv("XINSLM_NATIVE", "off")
    fresh = BPETokenizer.of(ours.definition)
    text = "the cat and that hat with all of them " * 4
    assert fresh.encode(text) == ours.encode(text)
    assert 0 < len(fresh._table) <= 3


def test_batch_is_flat_and_narrow(ours, prose):
    texts = ["", *prose[:20], "", "x"]
    ids, offsets = ours.encode_batch(texts)
    assert ids.dtype == np.uint16 and offsets.dtype == np.int64 and len(offsets) == len(texts) + 1
    parts = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert parts == [ours.encode(text) for text in texts]
    empty, offsets = ours.encode_batch([])
    assert len(empty) == 0 and offsets.tolist() == [0]


def test_large_vocabularies_need_32_bits(ours):
    definition = ours.definition
    far = type(definition)(**{**vars(definition), "special_tokens": {"<far>": 70_000}})
    tokenizer = BPETokenizer.of(far)
    ids, _ = tokenizer.encode_batch(["the cat"])
    assert ids.dtype == np.uint32 and ids.tolist() == ours.encode("the cat")
    assert tokenizer.encode("the<far>", allowed_special=True)[-1] == 70_000
    assert tokenizer.token_bytes(69_999) == b""


def test_control_tokens_in_text_are_text(ours, theirs):
    """Trap 11: only on request does text become control."""
    text = "hi<|im_end|>there<|endoftext|>"
    plain = ours.encode(text)
    assert not set(plain) & set(ours.special_tokens.values()) and ours.decode(plain) == text
    theirs.encode_special_tokens = False
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allowed_special=True) == expected
    assert ours.decode(ours.encode(text, allowed_special=True), skip_special=True) == "hithere"


def test_overlapping_control_tokens_the_longest_wins():
    tokenizer = BPETokenizer(260, special_tokens=("<a>", "<a><b>", "<b>"))
    ids = tokenizer.encode("<a><b><b>", allowed_special=True)
    assert ids == [tokenizer.special_tokens["<a><b>"], tokenizer.special_tokens["<b>"]]


def test_special_tokens_are_last_and_leave_other_ids(prose):
    bare, full = BPETokenizer(500, special_tokens=()), BPETokenizer(504)
    bare.train(prose)
    full.train(prose)
    assert list(full.special_tokens.values()) == [500, 501, 502, 503]
    assert (full.bos_id, full.eos_id, full.pad_id) == (500, 500, 503)
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, None)
    assert bare.encode(prose[0]) == full.encode(prose[0])


def test_untrained_tokenizer_knows_bytes():
    assert BPETokenizer().decode(BPETokenizer().encode("né🙂")) == "né🙂"


def test_lone_surrogates_become_replacement_characters(ours):
    """Trap 12: never a crash; two halves that belong together are their character."""
    assert ours.decode(ours.encode("a\ud83d\ude42b\ud800")) == "a🙂b\ufffd"


def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(ours, prose):
    """Trap 13: bits per byte rests on raw bytes, not on decoded strings."""
    text = prose[0] + "🙂日本"
    assert b"".join(map(ours.token_bytes, ours.encode(text))) == text.encode()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=12))
def test_ids_that_are_no_text_decode_like_hugging_face(ours, theirs, ids):
    assert ours.decode(ids) == theirs.decode(ids)


def test_ids_of_another_tokenizer(ours):
    for wrong in (ours.vocab_size, -1):
        with pytest.raises(XinslmError, match=r"not in 0\.\.1499"):
            ours.decode([wrong])


def test_fingerprint_says_whether_ids_mean_the_same(ours, prose, tmp_path):
    ours.save(tmp_path)
    assert BPETokenizer.load(tmp_path).fingerprint() == ours.fingerprint()
    others = [
        BPETokenizer(1499),
        BPETokenizer(1500, split="qwen2"),
        BPETokenizer(1500, special_tokens=list("#&+@")),
    ]
    for other in others:
        other.train(prose)
    assert len({t.fingerprint() for t in [ours, *others]}) == 4


def test_whole_pieces_of_the_vocabulary(tmp_path, theirs):
    """`ignore_merges`: 'abc' is one token as a piece, though no merge makes it."""
    content = json.loads(theirs.to_str())
    letters = {char: index for index, char in enumerate(sorted(BYTE_TO_CHAR.values()))}
    content |= {"added_tokens": [], "post_processor": None}
    content["model"] |= {"vocab": letters | {"ab": 256, "abc": 257}, "merges": [["a", "b"]]}
    for ignore in (True, False):
        content["model"]["ignore_merges"] = ignore
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        hf = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokenizer = BPETokenizer.load(tmp_path)
        for text in ("abc", "abcd", "abc abc", " abc"):
            assert tokenizer.encode(text) == hf.encode(text).ids
    assert tokenizer.encode("abc") == [256, letters["c"]]


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_two_ways_to_one_token(tmp_path, theirs, monkeypatch, mode):
    """Trap 4: two merges make one string, so there are more merges than new ids."""
    monkeypatch.setenv("XINSLM_NATIVE", mode)
    content = json.loads(theirs.to_str()) | {"added_tokens": [], "post_processor": None}
    letters = {char: index for index, char in enumerate(sorted(BYTE_TO_CHAR.values()))}
    merges = [["b", "c"], ["a", "bc"], ["a", "b"], ["ab", "c"], ["abc", "abc"]]
    content["model"] |= {
        "vocab": letters | {"bc": 256, "abc": 257, "ab": 258, "abcabc": 259},
        "merges": merges,
        "ignore_merges": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    hf = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = BPETokenizer.load(tmp_path)
    for text in ("abc", "abcabc", "aabcb", "abab abcab", "bcabcc"):
        assert tokenizer.encode(text) == hf.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("abcabc") == [259]
