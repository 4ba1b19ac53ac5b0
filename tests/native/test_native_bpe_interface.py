"""The C functions of BPE with arguments that no caller should pass: an error, never a crash."""

import ctypes
from ctypes import byref, c_char_p, c_int64, c_uint32, c_void_p

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.native.bpe import NativeEncoder, Vocabulary, bpe_library
from xinslm.native.load import last_error
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.alphabet import ALPHABET, SPLITS


@pytest.fixture(scope="module")
def lib():
    return bpe_library()


@pytest.fixture(scope="module")
def handle(lib):
    tokenizer = BPETokenizer(400)
    tokenizer.train(["the cat and the hat, that is it"] * 3)
    yield tokenizer._native._handle
    del tokenizer


def make(lib, tokens=b"ab", lengths=(1, 1), ids=(0, 1), merges=b"", merge_lengths=(), **changes):
    """Call xl_bpe_new; `changes` replace what belongs to the arrays."""
    values = {"size": len(tokens), "count": len(ids), "merge_size": len(merges), "ignore": 0}
    values |= {"pairs": len(merge_lengths) // 2, "rule": 0, "vocab_size": 300, **changes}
    array = (c_uint32 * len(lengths))(*lengths)
    numbers = (c_uint32 * len(ids))(*ids)
    others = (c_uint32 * len(merge_lengths))(*merge_lengths)
    return lib.xl_bpe_new(
        *(tokens, values["size"], array, numbers, values["count"]),
        *(merges, values["merge_size"], others, values["pairs"]),
        *(values["ignore"], values["rule"], values["vocab_size"]),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": -1}, "negative"),
        ({"count": -5}, "negative"),
        ({"pairs": -1}, "negative"),
        ({"vocab_size": -1}, "negative"),
        ({"vocab_size": 1}, "more ids"),
        ({"lengths": (1, 9)}, "shorter than their lengths"),
        ({"lengths": (1, 0)}, "longer than their lengths"),
        ({"lengths": (0xFFFFFFFF, 1)}, "shorter"),
        ({"ids": (0, 0xFFFFFFFF)}, "too large"),
        ({"rule": 4}, "no such split rule"),
        ({"rule": -1}, "no such split rule"),
        ({"merges": b"ab", "merge_lengths": (1, 1)}, "merge 0 has a token"),
        ({"merges": b"a", "merge_lengths": (1, 1)}, "shorter"),
    ],
)
def test_vocabularies_that_contradict_themselves(lib, changes, message):
    assert not make(lib, **changes)
    assert message in last_error(lib)


def test_an_encoder_that_is_not_ready(lib):
    made = c_void_p(make(lib))
    assert lib.xl_bpe_encode_piece(made, b"a", 1, None, 0) == -1
    assert "xl_bpe_ready" in last_error(lib)
    assert lib.xl_bpe_add_token(made, b"", 0, 2, 1) == -1
    assert lib.xl_bpe_add_token(made, b"x", 1, 300, 1) == -1
    assert lib.xl_bpe_ready(made) == 0 and lib.xl_bpe_ready(made) == 0
    assert lib.xl_bpe_add_token(made, b"x", 1, 2, 1) == -1
    lib.xl_bpe_free(made)
    lib.xl_bpe_free(None)


def encode(lib, handle, text, **changes):
    values = {"size": len(text), "count": 1, "threads": 1, "search": 1, "width": 2}
    values |= {"capacity": lib.xl_bpe_capacity(len(text)), **changes}
    out = np.zeros(max(lib.xl_bpe_capacity(len(text)), 0), np.uint16)
    offsets = np.zeros(2, np.int64)
    count = lib.xl_bpe_encode(
        *(handle, (c_char_p * 1)(text), (c_int64 * 1)(values["size"]), values["count"]),
        *(values["threads"], values["search"], values["width"]),
        *(out.ctypes.data, values["capacity"], offsets.ctypes.data),
    )
    return out[:count].tolist() if count >= 0 else None


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1},
        {"count": -1},
        {"threads": 0},
        {"threads": -3},
        {"search": 3},
        {"search": -1},
        {"width": 1},
        {"width": 8},
        {"capacity": 0},
        {"capacity": 7},
        {"capacity": -1},
    ],
)
def test_encoding_with_bad_arguments(lib, handle, changes):
    assert encode(lib, handle, b"the cat", **changes) is None
    assert last_error(lib)


def test_no_object(lib):
    assert lib.xl_bpe_encode_piece(None, b"a", 1, None, 0) == -1
    assert lib.xl_bpe_decode(None, None, 0, 0, None, 0) == -1
    assert lib.xl_bpe_tokens(None, byref(c_void_p()), byref(c_void_p())) == -1
    assert lib.xl_bpe_ready(None) == -1
    assert lib.xl_bpe_learner_start(None, 0, 0) == -1 and lib.xl_bpe_learner_run(None, 300) == -1
    assert lib.xl_bpe_capacity(-1) == -1


def test_null_texts(lib, handle):
    offsets = np.zeros(2, np.int64)
    out = np.zeros(64, np.uint16)
    for size, expected in ((0, 0), (5, -1)):
        found = lib.xl_bpe_encode(
            *(handle, (c_char_p * 1)(None), (c_int64 * 1)(size), 1, 1, 1, 2),
            *(out.ctypes.data, 64, offsets.ctypes.data),
        )
        assert found == expected


INVALID = [
    b"\xff\xfe",
    b"a\x80b\xbf",
    b"\xc0\xaf \xc1\xbf",
    b"abc\xe2\x82",
    b"\xe2",
    b"\xf0\x9f\x99",
    b"\xf5\x80\x80\x80 \xf8\x88\x80\x80\x80",
    b"\xed\xa0\x80x",
    b"'\xc5",
    b"'\xc5 ",
    b" \xe3\x80",
    bytes(range(256)) * 3,
    b"\x00" * 40,
]


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("text", INVALID)
def test_bytes_that_are_no_utf8_are_kept(lib, split, text):
    tokenizer = BPETokenizer(split=split)
    ids = encode(lib, tokenizer._native._handle, text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text
    learner = c_void_p(lib.xl_bpe_learner_new(0))
    sizes = (c_int64 * 1)(len(text))
    assert lib.xl_bpe_learner_texts(learner, (c_char_p * 1)(text), sizes, 1, 1) == 0
    assert lib.xl_bpe_learner_start(learner, 0, 0) > 0
    assert 256 <= lib.xl_bpe_learner_run(learner, 270) <= 270
    lib.xl_bpe_learner_free(learner)


def test_calls_of_a_learner_in_the_wrong_order(lib):
    learner = c_void_p(lib.xl_bpe_learner_new(1))
    assert lib.xl_bpe_learner_new(7) is None
    assert lib.xl_bpe_learner_run(learner, 300) == -1 and "not ended" in last_error(lib)
    assert lib.xl_bpe_learner_piece(learner, b"", 0, 1) == -1
    assert lib.xl_bpe_learner_piece(learner, b"ab", 2, -1) == -1
    assert lib.xl_bpe_learner_piece(learner, b"ab", -2, 1) == -1
    assert lib.xl_bpe_learner_start(learner, 0, -1) == -1
    assert lib.xl_bpe_learner_start(learner, -5, 0) == 0
    assert lib.xl_bpe_learner_start(learner, 0, 0) == -1
    assert lib.xl_bpe_learner_piece(learner, b"ab", 2, 1) == -1
    assert lib.xl_bpe_learner_texts(learner, (c_char_p * 1)(b"a"), (c_int64 * 1)(1), 1, 1) == -1
    assert lib.xl_bpe_learner_run(learner, -1) == -1
    assert lib.xl_bpe_learner_run(learner, 300) == 256
    assert lib.xl_bpe_learner_merges(learner, None, 4) == -1
    assert lib.xl_bpe_learner_merges(learner, None, 0) == 0
    lib.xl_bpe_learner_free(learner)


def test_decoding_with_little_room(lib, handle):
    ids = np.array([10, 20, 30], np.int64)
    assert lib.xl_bpe_decode(handle, ids.ctypes.data, 3, 0, None, 0) == 3
    assert lib.xl_bpe_decode(handle, ids.ctypes.data, -3, 0, None, 0) == -1
    assert lib.xl_bpe_decode(handle, None, 3, 0, None, 0) == -1
    out = ctypes.create_string_buffer(2)
    assert lib.xl_bpe_decode(handle, ids.ctypes.data, 3, 0, out, 2) == 3


def test_python_side_names_the_problem():
    tokens = {char: i for i, char in enumerate(ALPHABET)}
    for changes, message in (
        ({"tokens": {"a": -1}}, "outside"),
        ({"tokens": {"a": 9000}}, "outside"),
        ({"merges": [("a", "zz")]}, "merge 0 has a token"),
        ({"special": {"": 5}}, "empty"),
    ):
        values = {"tokens": tokens, "merges": [], "ignore_merges": False, "split": "gpt-2"}
        values |= {"added": {}, "special": {}, "vocab_size": 300, **changes}
        with pytest.raises(XinslmError, match=message):
            NativeEncoder.make(Vocabulary(**values))
