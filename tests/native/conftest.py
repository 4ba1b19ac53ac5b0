"""The native library's BPE, or a skipped test where the library is absent."""

import random
from collections.abc import Callable

import pytest

from xinslm.native import library, reason
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.files import Definition


@pytest.fixture(scope="session", autouse=True)
def native():
    lib = library()
    if lib is None:
        pytest.skip(f"the native library is absent: {reason()}")
    return lib


@pytest.fixture
def twin(monkeypatch) -> Callable[[Definition], BPETokenizer]:
    """Makes a tokenizer of the same definition that runs in Python."""

    def make(definition: Definition) -> BPETokenizer:
        made = BPETokenizer.of(definition)
        with monkeypatch.context() as off:
            off.setenv("XINSLM_NATIVE", "off")
            assert made._native is None
        return made

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Made-up documents: words, figures, marks, line ends and other scripts."""
    source = random.Random(11)
    syllables = ["th", "an", "ing", "er", "qu", "é", "ß", "東京", "и", "ا", "ab", "o", "n"]
    marks = [
        " ",
        " ",
        " ",
        "  ",
        "\n",
        "\r\n",
        ". ",
        ", ",
        "'s ",
        "'Ll ",
        " 12345 ",
        "\t",
        "!?\n\n",
    ]
    return [
        "".join(
            "".join(source.choices(syllables, k=source.randint(1, 5))) + source.choice(marks)
            for _ in range(150)
        )
        for _ in range(120)
    ]
