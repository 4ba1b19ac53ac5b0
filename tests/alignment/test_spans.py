"""Byte spans: each tokenizer's partition a text's bytes, and shared boundaries are those that brute
force finds.
"""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from other_tokenizers import KINDS, byte_level, characters, metaspace
from xinslm.alignment.spans import ByteReader, SpanAligner
from xinslm.errors import XinslmError
from xinslm.tokenizer.bpe import BPETokenizer

CHARACTERS = [
    "the",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "é",
    "e\u0301",
    "中",
    "😀",
    "👩‍👩‍👧",
    "'s",
    "12",
    "Lily",
    ".",
    "<s>",
    "\x00",
    "ﬁ",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(CHARACTERS), max_size=12).map("".join), st.text(max_size=20)
)
AWKWARD = [
    "",
    " ",
    "  a",
    "\r\nthe 😀 dog\r\n",
    "中文 é",
    " 'tis",
    "a\u0301b",
    "the cat \n\n sat",
    "👩‍👩‍👧",
    "\n",
]


@pytest.fixture(scope="module")
def readers():
    return {kind: ByteReader(make()) for kind, make in KINDS.items()}


def text_of(text):
    return text.encode("utf-8", "ignore").decode()


def reported(reader, text):
    """Character spans as the tokenizers library reports them for the same definition."""
    backend = Backend.from_str(json.dumps(reader.definition))
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_spans_partition_the_bytes(readers, kind, text):
    reader, text = readers[kind], text_of(text)
    ids, ends, _ = reader.read(text)
    assert ids.tolist() == reader.tokenizer.encode(text)
    assert (np.diff(ends, prepend=0) >= 0).all()
    assert (ends[-1] if len(ends) else 0) == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_tokens_that_spell_bytes_stand_where_those_bytes_are(readers, kind, text):
    reader, text = readers[kind], text_of(text)
    data = text.encode()
    ids, ends, spaced = reader.read(text)
    starts = np.concatenate(([0], ends))[: len(ids)]
    unknown = reader.tokenizer.special_tokens.get("<unk>", -1)
    for place, (token, a, b) in enumerate(zip(ids.tolist(), starts, ends, strict=True)):
        if token != unknown:
            spelled = reader.bytes[token]
            assert data[a:b] == (spelled[1:] if spaced and place == 0 else spelled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", AWKWARD)
def test_boundaries_on_characters_are_the_librarys(readers, kind, text):
    """Offsets of the tokenizers library are of characters; where one begins a token, so must ours
    at its byte.
    """
    reader = readers[kind]
    ids, ends, _ = reader.read(text)
    found = reported(reader, text)
    assert found.ids == ids.tolist()
    place = np.cumsum([0, *(len(c.encode()) for c in text)])
    theirs = {int(place[b]) for (_, b), (a, _) in itertools.pairwise(found.offsets) if a >= b}
    assert theirs <= set(ends.tolist())


def brute_shared(a, b, text):
    """Bytes where both begin a token, by spelling each out."""

    def begins(tokenizer):
        ids, data, out, at = tokenizer.encode(text), text.encode(), set(), 0
        spelled = [tokenizer.token_bytes(i) for i in ids]
        if b"".join(spelled) == b" " + data:
            at = -1
        for piece in spelled:
            out.add(max(at, 0))
            at += len(piece)
        return out

    return begins(a) & begins(b)


@pytest.mark.parametrize(
    ("first", "second"),
    list(itertools.permutations([k for k in KINDS if k != "characters"], 2)),
)
@settings(max_examples=25, deadline=None)
@given(TEXT)
def test_shared_boundaries_by_brute_force(first, second, text):
    text = text_of(text)
    student, teacher = KINDS[first](), KINDS[second]()
    if student.decode(student.encode(text)) != text:
        return
    ids = np.array([student.bos_id, *student.encode(text), student.eos_id])
    pair = SpanAligner(student, teacher).align(ids)
    # BOS has one byte
    shared = np.intersect1d(pair.student_starts[1:-2], pair.teacher_starts[1:-2]) - 1
    assert set(shared.tolist()) == brute_shared(student, teacher, text)
    assert pair.student_starts[-1] == pair.teacher_starts[-1] == len(text.encode()) + 2


def test_bos_on_one_side_only_shifts_nothing():
    student, teacher = byte_level(400), metaspace(300)
    ids = np.array(student.encode("Once upon a time\r\n😀 there"))
    bare = SpanAligner(student, teacher).align(ids)
    full = SpanAligner(student, teacher).align(np.array([student.bos_id, *ids]))
    assert (
        bare.teacher_ids.tolist() == full.teacher_ids.tolist()
        and bare.teacher_ids[0] == teacher.bos_id
    )
    assert (full.student_starts[1:] - 1 == bare.student_starts).all()
    assert (full.teacher_starts[1:] - 1 == bare.teacher_starts[1:]).all()
    none = BPETokenizer(vocab_size=256, special_tokens=())
    pair = SpanAligner(student, none).align(np.array([student.bos_id, *ids, student.eos_id]))
    assert pair.teacher_ids.tolist() == none.encode("Once upon a time\r\n😀 there<|endoftext|>")
    assert pair.teacher_starts[0] == 1 and pair.foreign.tolist() == [False] * (len(ids) + 1) + [
        True
    ]


def test_an_unknown_token_keeps_the_span_of_what_it_swallowed():
    ids, ends, spaced = ByteReader(characters()).read("Tom☃☃sat 😀.")
    unknown = [
        (int(a), int(b)) for i, a, b in zip(ids, [0, *ends[:-1]], ends, strict=True) if i == 0
    ]
    assert unknown == [(3, 9), (13, 17)] and spaced


def test_document_end_decides_where_one_token_is_both():
    student, teacher = byte_level(400), metaspace(300)
    ids = np.array([student.bos_id, *student.encode("a dog"), student.eos_id])
    ends = {
        end: SpanAligner(student, teacher, end).align(ids).teacher_ids[-1] for end in ("eos", "bos")
    }
    assert ends == {"eos": teacher.eos_id, "bos": teacher.bos_id}


def test_bytes_that_are_no_text_are_said():
    student = byte_level(400)
    half = [i for i in range(256) if student.token_bytes(i) == b"\xf0"]
    with pytest.raises(XinslmError, match="are not UTF-8 text"):
        SpanAligner(student, metaspace(300)).align(np.array([student.bos_id, *half]))
