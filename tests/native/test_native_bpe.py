"""The native BPE against the Python twin and against Hugging Face `tokenizers`."""

import copy
import importlib.util
import itertools
import json
import pickle
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from xinslm.errors import XinslmError
from xinslm.native.bpe import NativeEncoder, NativeLearner, Search
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.alphabet import ALPHABET, SPLITS, Split
from xinslm.tokenizer.files import new_definition
from xinslm.tokenizer.learn import MergeLearner, count_pieces

ROOT = Path(__file__).parents[2]
NASTY = "ab '’\r\n\t1٣é🙂.ſsStTrReElLvVdDmM\u00a0\u0085\u180e\u200b_e\u0301日\x00\ufeff"
CLASSED = regex.compile(r"[\p{L}\p{N}\s]")
TEXT = (
    st.text(st.characters(codec="utf-8"), max_size=100)
    | st.text(NASTY, max_size=100)
    | st.text("a 1\n'", max_size=60)
)


@pytest.fixture(scope="module", params=list(SPLITS))
def pair(request, texts):
    """A trained tokenizer for each split rule, and its twin in Python."""
    tokenizer = BPETokenizer(1200, split=request.param)
    tokenizer.train(texts)
    with pytest.MonkeyPatch.context() as off:
        off.setenv("XINSLM_NATIVE", "off")
        python = BPETokenizer.of(tokenizer.definition)
        assert python._native is None
    assert isinstance(tokenizer._native, NativeEncoder)
    return tokenizer, python


@pytest.fixture(scope="module", params=list(SPLITS))
def all_pairs(request):
    """A tokenizer that merges any two bytes, in a random order of ranks, and its twin in Python.

    Where a piece ends then shows in the ids; in those of a trained vocabulary it often does not.
    """
    pairs = list(itertools.product(ALPHABET, repeat=2))
    random.Random(5).shuffle(pairs)
    tokens = [*ALPHABET, *map("".join, pairs)]
    definition = new_definition(tokens, pairs, [], request.param)
    definition = replace(definition, ignore_merges=False)
    python = BPETokenizer.of(definition)
    with pytest.MonkeyPatch.context() as off:
        off.setenv("XINSLM_NATIVE", "off")
        assert python._native is None
    return BPETokenizer.of(definition), python


def hugging_face(tokenizer, folder):
    tokenizer.save(folder)
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return loaded


def same_batch(tokenizer, python, texts):
    ids, offsets = tokenizer.encode_batch(texts)
    expected, edges = python.encode_batch(texts)
    assert ids.dtype == expected.dtype and offsets.dtype == edges.dtype
    if not (np.array_equal(ids, expected) and np.array_equal(offsets, edges)):
        parts = zip(itertools.pairwise(offsets), itertools.pairwise(edges), texts, strict=True)
        for (a, b), (c, d), text in parts:
            assert ids[a:b].tolist() == expected[c:d].tolist(), ascii(text)


def test_cuts_for_threads_are_between_pieces(all_pairs, texts):
    tokenizer, python = all_pairs
    documents = [p.read_text(encoding="utf-8") for p in ROOT.glob("docs/*.md")]
    long = "\n".join([*documents, *texts, NASTY]) * 4
    assert len(long.encode()) > 1 << 20
    tokenizer.num_threads = 2
    same_batch(tokenizer, python, [long])


CONTEXTS = ["{}", "a{}b {}", " {}{}\n{}1", "'{}", "'{}e 'l{}", "1{} {}.{}", "{}{} \r{}"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_code_point(all_pairs, context):
    """All characters with LLaMA-3's rule; in contexts and with other rules samples of each class,
    because the table of classes is compared for all below.
    """
    tokenizer, python = all_pairs
    chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    if (tokenizer.split_name, context) != ("llama-bpe", "{}"):
        common, rare = chars[:0x3100], chars[0x3100:]
        chars = [c for c in common if CLASSED.match(c) or ord(c) % 13 == 0] + rare[::397]
    joined = [context.replace("{}", char) for char in chars]
    for begin in range(0, len(joined), 4096):
        part = joined[begin : begin + 4096]
        assert tokenizer._native.encode(part, Search.NONE, 1)[0].tolist() == [
            token for text in part for token in python.encode(text)
        ], f"between {part[0]!a} and {part[-1]!a}"


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, max_size=6))
def test_any_texts(all_pairs, texts):
    same_batch(*all_pairs, texts)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, max_size=6))
def test_any_texts_and_back(pair, texts):
    tokenizer, python = pair
    same_batch(tokenizer, python, texts)
    assert tokenizer.decode(tokenizer.encode_batch(texts)[0]) == "".join(texts)


def test_ids_of_hugging_face(pair, texts, tmp_path):
    tokenizer, _ = pair
    theirs = hugging_face(tokenizer, tmp_path)
    documents = [*texts, *(p.read_text(encoding="utf-8") for p in ROOT.glob("docs/*.md")), NASTY]
    ids, offsets = tokenizer.encode_batch(documents)
    encoded = theirs.encode_batch_fast(documents, add_special_tokens=False)
    for (begin, end), encoding in zip(itertools.pairwise(offsets), encoded, strict=True):
        assert ids[begin:end].tolist() == encoding.ids


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_texts_on_several_threads(pair, texts, threads):
    """Above half a megabyte a text is cut for threads; its pieces stay the same."""
    tokenizer, python = pair
    long = " ".join(texts) * 25
    batch = ["", long, "x", "a" * 600_000, *texts[:5], "", "word 1 " * 100_000 + " "]
    tokenizer.num_threads = threads
    same_batch(tokenizer, python, batch)


def test_one_encoder_in_several_python_threads(pair, texts):
    tokenizer, python = pair
    expected = python.encode_batch(texts)[0].tolist()
    results = []
    works = [
        threading.Thread(target=lambda: results.append(tokenizer.encode_batch(texts)[0].tolist()))
        for _ in range(8)
    ]
    for work in works:
        work.start()
    for work in works:
        work.join()
    assert results == [expected] * 8


def test_many_different_pieces_fall_out_of_the_cache(pair):
    """More pieces than the cache has slots, and long ones that it keeps elsewhere."""
    tokenizer, python = pair
    tokenizer.num_threads = 1
    words = " ".join(f"w{chr(97 + i % 26)}{i:x}q{i * 7919:x}" for i in range(200_000))
    long = " ".join("b" * (14 + i % 40) + "éa"[i % 2] * 3 for i in range(4_000))
    for text in (words, long, long, words[:100_000]):
        assert tokenizer.encode(text) == python.encode(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.text("theinga", min_size=1, max_size=12))
def test_long_and_short_pieces_merge_alike(pair, length, unit):
    tokenizer, python = pair
    piece = (unit * length)[:length].encode()
    assert tokenizer.encode_piece(piece) == python.encode_piece(piece)


@pytest.mark.parametrize("text", ["a" * 400_000, "\n " * 200_000, "'" * 300_000, "1" * 300_000])
def test_long_runs_are_not_quadratic(pair, text):
    tokenizer, _ = pair
    begin = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - begin < 2
    assert tokenizer.decode(ids) == text
    learner = BPETokenizer(300, split=tokenizer.split_name)
    learner.train([text + "ab"])
    assert time.process_time() - begin < 4


def test_control_and_added_tokens(texts, twin):
    base = BPETokenizer(400)
    base.train(texts)
    definition = replace(
        base.definition,
        special_tokens={"<s>": 400, "<s><t>": 401, "<t>": 402, "é!": 403},
        added_tokens={"<call>": 404, "<call> x": 405, "a b": 406},
    )
    ours, python = BPETokenizer.of(definition), twin(definition)
    ours.num_threads = 3
    cases = [
        "<s><t><s>",
        "hi<call> x<call>you<s>",
        "é!<",
        "a b" * 5,
        "xa b<t>",
        "<s",
        "",
        "\n<s> a",
    ]
    cases += ["many words a b in a long text " * 40_000]
    for text in cases:
        for allowed in (False, True):
            ids = ours.encode(text, allowed_special=allowed)
            assert ids == python.encode(text, allowed_special=allowed), text[:80]
            assert ours.decode(ids, skip_special=True) == python.decode(ids, skip_special=True)
    same_batch(ours, python, cases)
    assert ours.bytes_of_tokens == python.bytes_of_tokens


def test_texts_that_the_normalizer_changes(texts, twin):
    base = BPETokenizer(400)
    base.train(texts)
    definition = replace(base.definition, normalizer="NFC", added_tokens={"<e\u0301>": 400})
    ours, python = BPETokenizer.of(definition), twin(definition)
    cases = ["e\u0301te\u0301", "plain", "", "<e\u0301> \u1100\u1161", "é", "x\ud800e\u0301"]
    same_batch(ours, python, cases)
    for text in cases:
        assert ours.encode(text, allowed_special=True) == python.encode(text, allowed_special=True)


def test_lone_surrogates(pair):
    tokenizer, python = pair
    cases = ["a\ud83d\ude42b\ud800", "plain", "\udfff", "x\ud801\udc00y"]
    same_batch(tokenizer, python, cases)


def test_bytes_that_the_vocabulary_lacks_and_whole_pieces(pair, twin):
    """`ignore_merges`: a piece in the vocabulary is one token; unknown bytes are dropped."""
    tokenizer, _ = pair
    vocab = {char: i for i, char in enumerate("abcĠ")} | {"ab": 4, "abc": 5, "Ġa": 6, "日": 7}
    merges = [("a", "b"), ("Ġ", "a"), ("a", "b")]
    for ignore in (True, False):
        definition = replace(
            tokenizer.definition,
            vocab=vocab,
            merges=merges,
            ignore_merges=ignore,
            special_tokens={},
            post_processor=None,
        )
        ours, python = BPETokenizer.of(definition), twin(definition)
        cases = ["abc", "abcd abc", "xyz", " a ab", "日abc", "", "cab" * 100, "zzz" * 100]
        same_batch(ours, python, cases)
        assert ours.bytes_of_tokens == python.bytes_of_tokens


def test_ids_above_16_bits(pair, texts, twin):
    tokenizer, _ = pair
    definition = replace(tokenizer.definition, special_tokens={"<far>": 70_000})
    ours, python = BPETokenizer.of(definition), twin(definition)
    same_batch(ours, python, texts)
    assert ours.encode("the<far>", allowed_special=True)[-1] == 70_000


def test_copies_make_their_own_encoder(pair):
    tokenizer, _ = pair
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied.encode("the cat") == tokenizer.encode("the cat")


def test_decoding_checks_ids(pair):
    tokenizer, python = pair
    for wrong in ([1200], [-1], np.array([5, 1 << 40])):
        with pytest.raises(XinslmError, match=r"not in 0\.\.1199"):
            tokenizer.decode(wrong)
        with pytest.raises(XinslmError, match="is not in the vocabulary"):
            tokenizer._native.decode(np.asarray(wrong), False)
    assert tokenizer.decode([]) == "" and tokenizer.decode(np.arange(9, dtype=np.uint16)) == (
        python.decode(list(range(9)))
    )
    long = python.encode("internationalization " * 500)
    assert tokenizer.decode(long) == python.decode(long)


def hf_merges(split, texts, num_tokens, min_frequency):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split].pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize(("num_tokens", "min_frequency"), [(300, 0), (2000, 0), (9000, 3)])
def test_merges_of_hugging_face(split, num_tokens, min_frequency, texts):
    documents = [*texts, *(p.read_text(encoding="utf-8") for p in ROOT.glob("docs/*.md"))]
    ours = BPETokenizer(num_tokens, (), min_frequency, split=split)
    ours.num_threads = 2
    ours.train(documents)
    assert ours.merges == hf_merges(split, documents, num_tokens, min_frequency)


def python_merges(texts, num_tokens, min_frequency, longest, split="llama-bpe"):
    pieces = count_pieces(texts, SPLITS[split], lambda _: None)
    learner = MergeLearner(pieces, min_frequency, longest)
    for _ in learner.run(num_tokens):
        pass
    return learner.merges


@settings(max_examples=150, deadline=None)
@given(
    st.lists(TEXT | st.text("ab", max_size=50), min_size=1, max_size=12),
    st.integers(256, 600),
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([None, 2, 3, 8]),
    st.sampled_from(list(SPLITS)),
)
def test_merges_of_the_twin(texts, num_tokens, min_frequency, longest, split):
    texts = [*texts, "abab aaaa", "x\ud801\udc00y"]
    ours = BPETokenizer(num_tokens, (), min_frequency, longest, split)
    ours.train(texts)
    assert ours.merges == python_merges(texts, num_tokens, min_frequency, longest, split)


def test_threads_learn_the_same(texts):
    long = [" ".join(texts) * 8, *texts]
    found = []
    for threads in (1, 2, 7):
        tokenizer = BPETokenizer(900)
        tokenizer.num_threads = threads
        tokenizer.train(iter(long))
        found.append(tokenizer.merges)
    assert found[0] == found[1] == found[2]


def test_counts_have_64_bits():
    learner = NativeLearner.make("llama-bpe", 1)
    for piece, count in Counter({b"ab": 3, b"cd": 2**32 + 1, b"ce": 2**31}).items():
        learner.add_piece(piece, count)
    assert learner.start(0, None) == 3 and learner.run(259) == 259
    named = [(ALPHABET[left], ALPHABET[right]) for left, right in learner.merges().tolist()]
    assert named == [("c", "d"), ("c", "e"), ("a", "b")]


def test_unknown_split_rules_run_in_python(monkeypatch, texts):
    monkeypatch.setitem(SPLITS, "words", Split("words", r"\S+|\s+"))
    tokenizer = BPETokenizer(300, split="words")
    tokenizer.train(texts)
    assert tokenizer._native is None and tokenizer.decode(tokenizer.encode("a-b c")) == "a-b c"


def test_switched_off(monkeypatch, texts):
    monkeypatch.setenv("XINSLM_NATIVE", "off")
    tokenizer = BPETokenizer(300)
    tokenizer.train(texts[:3])
    assert tokenizer._native is None and tokenizer.merges == python_merges(texts[:3], 296, 0, None)


def test_class_table_is_the_one_of_the_regex_module():
    path = ROOT / "native" / "scripts" / "unicode_table.py"
    spec = importlib.util.spec_from_file_location("unicode_table", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["unicode_table"] = script
    spec.loader.exec_module(script)
    assert script.TARGET.read_text() == script.table(), f"run: python {path}"
