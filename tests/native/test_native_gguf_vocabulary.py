"""A GGUF file's vocabulary in the library, against the same vocabulary read in Python, which other
tests compare with llama.cpp.
"""

import copy
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest

from xinslm.errors import UsageError, XinslmError
from xinslm.gguf_file import GgufFile, Strings
from xinslm.native.bpe import NativeEncoder, bpe_library
from xinslm.native.load import last_error
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer import gguf as reader
from xinslm.tokenizer.alphabet import ALPHABET

TEXTS = [
    "the cat and the hat, that is it 123 then",
    "<|end|>the<|begin|> <tag>that</tag> é 漢字 \n\n",
    "",
    "thethethe " * 40,
]
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def trained() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small vocabulary."""
    tokenizer = BPETokenizer(320, special_tokens=())
    tokenizer.train([text for text in TEXTS if "<" not in text] * 3)
    merges = [" ".join(pair) for pair in tokenizer.merges]
    return list(tokenizer.definition.vocab), merges


TOKENS, MERGES = trained()


def write(
    path: Path,
    tokens: list[str | bytes],
    kinds: list[int],
    merges: list[str],
    pre: str = "gpt-2",
    **ids: int,
) -> dict:
    """Write a vocabulary as a GGUF file; return the keys that are read from it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name, token in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(True)
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path).keys


def in_python(keys: dict) -> BPETokenizer:
    """The tokenizer from keys whose strings are lists."""
    return reader.read_tokenizer(
        {key: list(value) if isinstance(value, Strings) else value for key, value in keys.items()},
        "x",
    )


def is_in_library(tokenizer: BPETokenizer) -> bool:
    return "definition" not in vars(tokenizer)


def require_same(ours: BPETokenizer, theirs: BPETokenizer) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        ids = theirs.encode(text, allowed_special=True)
        assert ours.encode(text, allowed_special=True) == ids
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special=True)
        assert [ours.token_bytes(i) for i in ids] == [theirs.bytes_of_tokens[i] for i in ids]
    assert ours.bytes_of_tokens == theirs.bytes_of_tokens
    for name in (
        *("vocab_size", "special_tokens", "added_tokens", "named_tokens", "start_ids"),
        *("bos_id", "eos_id", "pad_id", "split_name", "chat_template"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


LATE = ([*TOKENS, "<|end|>", "<|begin|>", "<tag>", "[PAD]"], [NORMAL] * len(TOKENS) + [3, 3, 4, 5])
EARLY = (["<|end|>", "<|begin|>", "<tag>", *TOKENS], [3, 3, 4] + [NORMAL] * len(TOKENS))
HOLES = (
    ["<|begin|>", *TOKENS, "[gap]", "漢", "\u0100x ", "<|end|>"],
    [CONTROL] + [NORMAL] * len(TOKENS) + [UNUSED, NORMAL, NORMAL, CONTROL],
)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
@pytest.mark.parametrize("vocabulary", [LATE, EARLY, HOLES], ids=["late", "early", "holes"])
def test_the_library_reads_what_python_reads(tmp_path, vocabulary, pre):
    tokens, kinds = vocabulary
    merges = [*MERGES, "zz qq", "<|begin|> t"]
    begin, end = tokens.index("<|begin|>"), tokens.index("<|end|>")
    keys = write(tmp_path / "m.gguf", tokens, kinds, merges, pre, bos=begin, eos=end, padding=70)
    ours, theirs = reader.read_tokenizer(keys, "x"), in_python(keys)
    assert is_in_library(ours) and not is_in_library(theirs)
    require_same(ours, theirs)
    assert is_in_library(ours)
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.definition == theirs.definition and ours.merges == theirs.merges
    for again in (
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(reader.read_tokenizer(keys, "x")),
    ):
        require_same(again, theirs)


@pytest.mark.parametrize(
    ("tokens", "kinds", "merges", "said"),
    [
        ([TOKENS[80]], [NORMAL], [], "token is there twice"),
        ([TOKENS[80]], [CONTROL], [], "token is there twice"),
        (["<x>", "<x>"], [CONTROL, USER], [], ""),
        ([b"\xed\xa0\x80"], [NORMAL], [], "not UTF-8"),
        ([b"a\xff"], [UNUSED], [], "not UTF-8"),
        ([], [], [MERGES[0]], "merge is there twice"),
    ],
)
def test_what_is_rare_is_left_to_python(tmp_path, tokens, kinds, merges, said):
    tokens, kinds = [*TOKENS, *tokens], [NORMAL] * len(TOKENS) + kinds
    merges = [*MERGES, *merges]
    keys = write(tmp_path / "m.gguf", tokens, kinds, merges, bos=3)
    ours = reader.read_tokenizer(keys, "x")
    assert not is_in_library(ours)
    assert said in last_error(bpe_library())
    require_same(ours, in_python(keys))


@pytest.mark.parametrize("merge", ["a", "a b c", ""])
def test_odd_merges_are_refused_as_before(tmp_path, merge):
    keys = write(tmp_path / "m.gguf", TOKENS, [NORMAL] * len(TOKENS), [*MERGES, merge])
    with pytest.raises(UsageError, match="its tokenizer is damaged"):
        reader.read_tokenizer(keys, "x")


def test_strings_are_those_of_the_gguf_package(tmp_path):
    tokens = ["", "a", "é" * 200, b"\xff", "x" * 70_000, "end"]
    keys = write(tmp_path / "m.gguf", tokens, [NORMAL] * 6, ["a b"])
    found = keys["tokenizer.ggml.tokens"]
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"]
    expected = [bytes(field.parts[i]).decode("utf-8", "replace") for i in field.data]
    assert list(found) == expected and found == expected and len(found) == 6
    assert found.pick([3, 1]) == {1: "a", 3: "\ufffd"} and found.pick([]) == {}
    assert found[2] == "é" * 200 and found[-1] == "end"


@pytest.mark.parametrize("length", [2**63, 2**64 - 1])
def test_a_length_that_no_file_has(tmp_path, length):
    path = tmp_path / "m.gguf"
    write(path, ["aaaa", "b", "c"], [NORMAL] * 3, ["a b"])
    data, mark = path.read_bytes(), b"aaaa"
    at = data.index(len(mark).to_bytes(8, "little") + mark)
    path.write_bytes(data[:at] + length.to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(XinslmError, match="in the middle of its header"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (b"\x01", "fewer strings"),
        (b"\x02" + bytes(7) + b"a", "cut off"),
        (b"\xff" * 8, "cut off"),
        (b"\x01" + bytes(7) + b"ab", "more strings"),
        (b"\x01" + bytes(7) + b"\xc0", "not UTF-8"),
    ],
)
def test_arrays_that_contradict_themselves(tokens, said):
    kinds, none = np.ones(1, np.int32), np.zeros(0, np.uint8)
    made = NativeEncoder.of_gguf(np.frombuffer(tokens, np.uint8), kinds, (none, 0), "gpt-2")
    assert made is None and said in last_error(bpe_library())


def test_every_byte_sequence_of_two_is_judged_as_python_judges_it():
    none = np.zeros(0, np.uint8)
    for lead in range(0xC0, 0x100):
        for tail in (b"", b"\x80", b"\x9f\x80", b"\xa0\x80", b"\x8f\xbf\xbf", b"\x90\xbf\xbf"):
            text = bytes([lead]) + tail
            data = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
            made = NativeEncoder.of_gguf(data, np.ones(1, np.int32), (none, 0), "gpt-2")
            assert (made is not None) == ("\ufffd" not in text.decode("utf-8", "replace")), text


def test_the_alphabet_is_complete():
    assert set(ALPHABET) <= set(TOKENS)
