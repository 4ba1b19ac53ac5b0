"""Tests of the native library; those that load it skip by name where it was not built."""

import random
from collections.abc import Callable

import pytest

from xinslm.native import library, reason
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.files import Definition

needs_library = pytest.mark.skipif(
    library() is None, reason=f"the native library is not there: {reason()}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/native/" in str(item.path) and not item.get_closest_marker("without_library"):
            item.add_marker(needs_library)


@pytest.fixture(scope="session")
def native():
    """The library."""
    return library()


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
