"""The byte-level alphabet and the split rules of byte-level BPE.

Vocabulary files spell each byte as one printable character (GPT-2, Radford et al. 2019): the
printable bytes as themselves, the others from U+0100 on, so that a space is 'Ġ'. A split rule cuts
text into pieces that merges never cross. Each carries llama.cpp's name for it
(`tokenizer.ggml.pre`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex


def _characters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


BYTE_TO_CHAR: dict[int, str] = _characters()
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}
ALPHABET: list[str] = sorted(CHAR_TO_BYTE)
"""The 256 characters in the order of their ids in a new vocabulary: by code point. This order
breaks ties in training.
"""

_TO_CHARS = [BYTE_TO_CHAR[byte] for byte in range(256)]


def spell(data: bytes) -> str:
    """Spell bytes with the characters of a vocabulary file."""
    return "".join(_TO_CHARS[byte] for byte in data)


def unspell(token: str) -> bytes | None:
    """Return the bytes of a token as `spell` writes them; None if it is spelled otherwise."""
    try:
        return bytes(CHAR_TO_BYTE[char] for char in token)
    except KeyError:
        return None


@dataclass(frozen=True)
class Split:
    """A rule that cuts text into pieces."""

    name: str
    """llama.cpp's name of the rule."""
    pattern: str
    """The regular expression; its matches partition any text."""

    @cached_property
    def regex(self) -> "regex.Pattern[str]":
        """The compiled pattern."""
        import regex  # takes longer to import than a short text to encode

        return regex.compile(self.pattern)


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BEFORE_DIGIT = r"\s+(?=\p{N})|\s+(?!"

SPLITS: dict[str, Split] = {
    split.name: split
    for split in (
        Split("llama-bpe", _LLAMA3),
        Split("gpt-2", _GPT2),
        Split("qwen2", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
        # GPT-2's between single digits, so that the spaces before a digit stay together
        Split("smollm", _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\s+(?!", _BEFORE_DIGIT)),
    )
}
"""Known rules by name: LLaMA-3's (the default), GPT-2's, Qwen2's, SmolLM's."""
