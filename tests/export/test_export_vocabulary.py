"""Tokenizers in GGUF: llama.cpp makes the same ids of the same text, and of the same chat."""

import json

import numpy as np
import pytest
from gguf import GGUFReader

from llama_cpp import LlamaCpp
from small_models import LLAMA3, SPECIALS, TEXT, save_random_model
from xinslm.errors import XinslmError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run
from xinslm.tokenizer.load import load_tokenizer

TEXTS = [
    TEXT,
    "a",
    " ",
    "  leading and trailing  ",
    "\n\n\n",
    "tabs\t\tand\r\nCRLF\r\n\r\nlines",
    "It's we're I'VE they'll don't you'd 'tis",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ² ١٢٣ १२३",
    'C++ != C#; x=>y && z || (a[b]{c}) "quoted" ... !!! ---',
    "我们在学习。 日本語のテキスト 한국어 텍스트",
    "Привет мир! Ελληνικά. עברית العربية हिन्दी ไทย",
    "😀 👩‍👩‍👧 🇩🇪 e\u0301 \u00e9 \u200b zero \ufeff bom",
    "\u00a0no-break\u2003em space\u3000ideographic",
    "thequickbrownfox THE QUICK aAbB",
    "\x00\x01\x7f control",
    "<|end|> is text here, <s> too",
]


def keys_of(path):
    return {
        name: field.contents()
        for name, field in GGUFReader(path).fields.items()
        if "tokenizer" in name
    }


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabulary")
    save_random_model(root / "model", vocab_size=331)
    run(GgufConfig(root / "model", root / "m.gguf"))
    with LlamaCpp(root / "m.gguf") as llama:
        yield root, llama


def test_byte_level_ids_are_ours(byte_level):
    root, llama = byte_level
    ours = load_tokenizer(root / "model")
    for text in TEXTS:
        assert llama.tokenize(text) == ours.encode(text), repr(text)
        assert llama.tokenize(text, add_special=True) == ours.encode(text), (
            "no BOS is added: it was not trained so"
        )


def test_special_tokens_are_control_tokens(byte_level):
    root, llama = byte_level
    ours = load_tokenizer(root / "model")
    text = "<|begin|>hello<|end|> there<|user|>\n"
    assert llama.tokenize(text, parse_special=True) == ours.encode(text, allowed_special=True)
    keys = keys_of(root / "m.gguf")
    assert [keys["tokenizer.ggml.token_type"][ours.special_tokens[name]] for name in SPECIALS] == [
        3
    ] * 5
    assert keys["tokenizer.ggml.bos_token_id"] == 0 and keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.ggml.padding_token_id"] == 2
    assert keys["tokenizer.ggml.pre"] == "llama-bpe" and keys["tokenizer.ggml.model"] == "gpt2"
    assert (
        keys["tokenizer.ggml.add_bos_token"] is False
        and keys["tokenizer.ggml.add_space_prefix"] is False
    )


def test_rows_without_a_token_are_unused(byte_level):
    root, llama = byte_level
    keys, tokens = keys_of(root / "m.gguf"), load_tokenizer(root / "model").vocab_size
    assert len(keys["tokenizer.ggml.tokens"]) == 331 and tokens < 331
    assert keys["tokenizer.ggml.tokens"][tokens:] == [f"[PAD{i}]" for i in range(tokens, 331)]
    assert keys["tokenizer.ggml.token_type"][tokens:] == [5] * (331 - tokens)
    assert max(llama.tokenize("[PAD330] [PAD325]", parse_special=True)) < tokens


def test_chat_template_renders_and_tokenizes_as_ours(byte_level):
    root, llama = byte_level
    messages = [
        {"role": "user", "content": "  What's 12345 + 1?\nTell me. "},
        {"role": "assistant", "content": "It's 12346 – naïve 😀"},
        {"role": "user", "content": "Thanks!"},
    ]
    rendered = llama.apply_template(messages)
    ours, _ = load_tokenizer(root / "model").apply_chat_template(
        messages, add_generation_prompt=True
    )
    assert llama.tokenize(rendered, add_special=True, parse_special=True) == list(ours)


def test_sentencepiece_ids_are_ours(shared_data, tmp_path):
    source = shared_data / "models" / "stories260K"
    result = run(GgufConfig(source, tmp_path / "m.gguf"))
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_bos_token"] is True
    assert (
        keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
        and keys["tokenizer.ggml.tokens"][3] == "<0x00>"
    )
    assert keys["tokenizer.ggml.unknown_token_id"] == 0
    assert result.notes == ()
    ours = load_tokenizer(source)
    stories = (shared_data / "text" / "tinystories_docs.jsonl").read_text().splitlines()[:20]
    texts = TEXTS + [json.loads(line).get("text", line) for line in stories]
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        for text in texts:
            assert llama.tokenize(text) == ours.encode(text), repr(text)
        assert llama.tokenize("a", add_special=True)[0] == 1


def test_real_byte_level_tokenizer_on_its_corpus(shared_data, tmp_path):
    import gzip

    source = shared_data / "models" / "stories5M"
    run(GgufConfig(source, tmp_path / "m.gguf"))
    with gzip.open(
        shared_data / "text" / "stories_valid.jsonl.gz", "rt", encoding="utf-8"
    ) as lines:
        texts = TEXTS + [line for _, line in zip(range(30), lines, strict=False)]
    ours = load_tokenizer(source)
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        for text in texts:
            assert llama.tokenize(text) == ours.encode(text), repr(text)


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    change(spec)
    path.write_text(json.dumps(spec), encoding="utf-8")


def test_a_split_rule_that_llama_cpp_does_not_have_is_refused(tmp_path):
    save_random_model(tmp_path / "model")

    def change(spec):
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA3.replace(
            "{1,3}", "{1,2}"
        )

    edit_tokenizer(tmp_path / "model", change)
    with pytest.raises(XinslmError, match="rule for splitting"):
        run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_more_tokens_than_rows_are_refused(tmp_path):
    save_random_model(tmp_path / "model", vocab_size=300)
    with pytest.raises(XinslmError, match=r"token id \d+, but the model's embedding only 300 rows"):
        run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))


def test_logits_of_unused_rows_are_there(byte_level):
    """The table keeps all rows, so probabilities sum to one over them as in PyTorch."""
    _, llama = byte_level
    assert np.exp(llama.next_logprobs([5, 6, 7], 331)).sum() == pytest.approx(1, abs=1e-3)


def llama_cpp_vectors(path):
    """llama.cpp's own test texts and the ids that go with them."""
    texts = (
        path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    )
    ids = [
        [int(i) for i in line.split()]
        for line in path.with_suffix(".gguf.out").read_text().splitlines()
    ]
    assert len(texts) >= len(ids) > 20
    return list(zip(texts, ids, strict=False))


@pytest.mark.parametrize(
    ("name", "rows", "files"),
    [
        ("llama-spm", 32000, {"tokenizer.model": "llama2_32k.model"}),
        ("gpt-2", 50257, {"vocab.json": "gpt2/vocab.json", "merges.txt": "gpt2/merges.txt"}),
    ],
)
def test_llama_cpps_own_vectors(shared_data, tmp_path, name, rows, files):
    """LLaMA-2's sentencepiece model alone, and GPT-2's two old files, give the ids in llama.cpp's
    repository.
    """
    tokenizers = shared_data / "tokenizers"
    save_random_model(
        tmp_path / "model",
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / file).unlink()
    for target, origin in files.items():
        (tmp_path / "model" / target).write_bytes((tokenizers / origin).read_bytes())
    result = run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    assert result.notes == ()
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        for text, ids in llama_cpp_vectors(tokenizers / f"ggml-vocab-{name}.gguf"):
            assert llama.tokenize(text) == ids, repr(text)
        assert (llama.tokenize("a", add_special=True)[0] == 1) == (name == "llama-spm"), (
            "BOS, or none"
        )
