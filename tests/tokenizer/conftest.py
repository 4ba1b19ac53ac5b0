"""The independent oracle, Hugging Face's `tokenizers`, and texts that are made here."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

# The patterns as LLaMA-3, Qwen2 and GPT-2 publish them, not taken from the package under test.
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN2 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def byte_level(**model: Any) -> Tokenizer:
    """A `tokenizers` BPE with the LLaMA-3 split."""
    tokenizer = Tokenizer(models.BPE(**model))
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def hf_train(texts: list[str], num_tokens: int, min_frequency: int = 0) -> dict[str, Any]:
    """What `BpeTrainer` makes of texts: the 'model' part of a tokenizer.json."""
    tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


@pytest.fixture(scope="session")
def hf_trained() -> Callable[..., dict[str, Any]]:
    return hf_train


@pytest.fixture(scope="session")
def patterns() -> dict[str, str]:
    return {"llama-bpe": LLAMA3, "qwen2": QWEN2}


TRICKY = [
    "",
    " ",
    "a",
    "\n",
    "\r\n\r\nx",
    "a\r\n  b\t\n \n",
    "it's IT'S x'ſab 'LLama they'Ll",
    "12345 1 22 ٣٤٥٦ Ⅷ½²",
    "trailing   ",
    "  leading",
    "x \u00a0\u3000y\u0085z\u180ew\u200bq",
    "naïve café Ünïcödé ﬁ ß İı",
    "日本語テキスト、中文。",
    "🙂👍🏽👨‍👩‍👧 e\u0301 \u0301",
    "!!!...???\n\n-->",
    "_snake_case __init__(self):",
    "\x00\x01\x7f\ufffd\ufeff",
    "<|endoftext|> <|im_start|> <|pad",
    "a" * 3000,
    "ab" * 900 + " " * 700 + "\n" * 300,
    "ĠĊ Āā",
    "'s's're'",
]


@pytest.fixture(scope="session")
def tricky() -> list[str]:
    return TRICKY


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Two hundred made-up documents: words of a few syllables, punctuation, figures, other
    scripts.
    """
    source = random.Random(7)
    parts = [
        *list("aeopéß東и"),
        "th",
        "an",
        "ing",
        "re",
        "on",
        "st",
        "er",
        "qu",
        "ou",
        "li",
        "sh",
        "mb",
    ]
    words = ["".join(source.choices(parts, k=source.randint(1, 5))) for _ in range(1500)]
    words += [
        "don't",
        "WE'LL",
        "x_1",
        "3.14159",
        "2024",
        "(see",
        "§4)",
        "---",
        "http://a.b/c?d=e",
        "🙂",
    ] * 20
    texts = []
    for _ in range(200):
        chosen = [
            source.choice(words) + source.choice(["", "", "", ",", ".", "s", "ing"])
            for _ in range(80)
        ]
        texts.append(
            "".join(word + source.choice([" ", " ", " ", "  ", "\n", "\r\n"]) for word in chosen)
        )
    return texts


def read_texts(path: Path, limit: int) -> list[str]:
    """First `limit` texts of a .jsonl.gz."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [json.loads(line) for _, line in zip(range(limit), file, strict=False)]
    return [row["text"] for row in rows]


@pytest.fixture(scope="session")
def corpora(shared_data: Path) -> dict[str, list[str]]:
    text = shared_data / "text"
    return {
        "shakespeare": [(text / "tinyshakespeare.txt").read_bytes().decode()],
        "stories": read_texts(text / "stories_train.jsonl.gz", 1500),
        "peps": read_texts(text / "peps.jsonl.gz", 60),
    }
