"""Sentencepiece vocabularies behind the same interface, against sentencepiece, llama.cpp's vectors
and transformers.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from xinslm.errors import XinslmError
from xinslm.tokenizer import StreamDecoder, load_tokenizer
from xinslm.tokenizer.hf import HFTokenizer


@pytest.fixture
def made(tmp_path):
    """A small sentencepiece-style BPE with byte fallback, written by `tokenizers`."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "▁a",
        "bc",
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocab,
        merges=[("▁", "a"), ("b", "c")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    return load_tokenizer(tmp_path), tokenizer


def test_small_sentencepiece_style(made, tmp_path):
    ours, theirs = made
    assert isinstance(ours, HFTokenizer)
    for text in ("a bc", " a", "", "é🙂 a", "a\n bc  "):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    assert (
        ours.decode([1, *ours.encode("a"), 2]) == "<s> a</s>"
        and ours.decode([1, 263, 2], skip_special=True) == "a"
    )
    assert [ours.token_bytes(t) for t in (1, 3 + 0xE9, 259, 263)] == [b"<s>", b"\xe9", b" ", b" a"]
    assert 2 not in ours.encode("a</s>") and ours.encode("a</s>", allowed_special=True)[-1] == 2
    assert ours.decode(ours.encode("a\ud800")) == "a\ufffd"
    ids, offsets = ours.encode_batch(["a", "", "bc a"])
    assert ids.tolist() == ours.encode("a") + ours.encode("bc a") and offsets.tolist() == [
        0,
        1,
        1,
        len(ids),
    ]
    with pytest.raises(XinslmError, match="not in 0"):
        ours.token_bytes(ours.vocab_size)


def test_stream_equals_decode_at_once(made):
    ours, _ = made
    for text in ("a bc é🙂", "  a", "日本"):
        stream = StreamDecoder(ours)
        parts = [stream.add(token) for token in ours.encode(text)] + [stream.finish()]
        assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    continued = StreamDecoder(ours, at_start=False)
    assert continued.add(263) == " a"
    broken = StreamDecoder(ours)
    assert broken.add(3 + 0xE6, 3 + 0x97) == "" and broken.finish() == "\ufffd"


def test_saved_file_is_the_one_that_was_read(made, tmp_path):
    ours, theirs = made
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint() == ours.fingerprint() and again.eos_id == 2
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert auto("a bc é", add_special_tokens=False)["input_ids"] == ours.encode("a bc é")
    original = json.loads(theirs.to_str())
    assert json.loads((tmp_path / "saved/tokenizer.json").read_text("utf-8")) == original


def test_word_pieces_have_no_bytes(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(XinslmError, match="WordPiece tokenizer have no bytes"):
        load_tokenizer(tmp_path)


def test_broken_sentencepiece_models(tmp_path):
    pytest.importorskip("sentencepiece")
    for content in (b"\x80\x04not a model", b"", b"hello there"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(XinslmError, match=r"tokenizer\.model: .*sentencepiece model"):
            load_tokenizer(tmp_path)


def test_sentencepiece_model_made_here(tmp_path, prose):
    """Learn a BPE with sentencepiece itself; the translation gives its ids."""
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(text.split()) for text in prose), "utf-8")
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.vocab").unlink()
    oracle = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    for text in prose[:50]:
        assert ours.encode(text) == oracle.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 900)


@pytest.mark.parametrize(
    "name",
    ["tokenizers/llama2_32k.model", "models/babyllama105", "models/babyllama105/tok105.model"],
)
def test_real_sentencepiece_models(shared_data, corpora, tricky, name):
    library = pytest.importorskip("sentencepiece")
    file = shared_data / name
    file = file / "tok105.model" if file.is_dir() else file
    oracle = library.SentencePieceProcessor(model_file=str(file))
    ours = load_tokenizer(shared_data / name)
    for text in [
        *corpora["peps"][:5],
        *corpora["stories"][:50],
        *(t for t in tricky if "<|" not in t and "\x00" not in t),
    ]:
        assert ours.encode(text) == oracle.encode(text), text[:80]


def llama_cpp_vectors(folder, name):
    texts = (folder / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{name}.out").read_text().split("\n")
    pairs = [(text, list(map(int, line.split()))) for text, line in zip(texts, lines, strict=False)]
    assert len(pairs) > 40
    return pairs


@pytest.mark.parametrize(
    ("vectors", "tokenizer"),
    [("ggml-vocab-gpt-2.gguf", "gpt2"), ("ggml-vocab-llama-spm.gguf", "llama2_32k.model")],
)
def test_vectors_of_llama_cpp(shared_data, vectors, tokenizer):
    folder = shared_data / "tokenizers"
    ours = load_tokenizer(folder / tokenizer)
    for text, ids in llama_cpp_vectors(folder, vectors):
        assert ours.encode(text) == ids, ascii(text)


def test_llama3_cuts_of_llama_cpp(shared_data):
    """The LLaMA-3 vocabulary is not at hand, but its number of tokens is at least that of the
    pieces.
    """
    from xinslm.tokenizer.alphabet import SPLITS

    for text, ids in llama_cpp_vectors(shared_data / "tokenizers", "ggml-vocab-llama-bpe.gguf"):
        assert len(SPLITS["llama-bpe"].regex.findall(text)) <= len(ids), ascii(text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=60))
def test_stories260k_round_trips(shared_data, text):
    ours = load_cached(shared_data)
    assert ours.decode(ours.encode(text)) == text
    theirs = ours._backend.decode(ours.encode(text))
    assert theirs == text


_LOADED = {}


def load_cached(shared_data):
    return _LOADED.setdefault("stories260K", load_tokenizer(shared_data / "models/stories260K"))


def test_stories260k(shared_data, corpora):
    ours = load_cached(shared_data)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (512, 1, 2, 0)
    assert ours.strips_first_space
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
        shared_data / "models/stories260K"
    )
    for text in corpora["stories"][:50]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids)
