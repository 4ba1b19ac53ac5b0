"""The tokenizer interface, and helpers that need nothing else: fingerprints, joined bytes,
streaming decoding.

Two classes implement it: `BPETokenizer` (our byte-level BPE) and `HFTokenizer` (any other Hugging
Face tokenizer), which inherit what they have in common. Both encode without BOS and EOS. Special
tokens in a text are encoded as ordinary text unless `allowed_special` is set.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from xinslm.errors import XinslmError


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    """Number of ids, special tokens included: ids are 0 to vocab_size - 1."""
    special_tokens: dict[str, int]
    """Control tokens: content to id."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    start_ids: list[int]
    """Ids that the tokenizer's files prepend to a text (`encode` does not): often BOS, or none."""
    chat_template: str | None
    """Jinja template of a conversation; None if the tokenizer has none."""
    named_tokens: dict[str, str]
    """'bos_token', 'eos_token', 'pad_token', 'unk_token': their contents."""
    strips_first_space: bool
    """Whether decoding drops one leading space, which sentencepiece adds when it encodes."""

    def encode(self, text: str, allowed_special: bool = False) -> list[int]:
        """Turn text into ids; control tokens in it become their ids only with `allowed_special`."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts into flat ids (type: `id_dtype`) and int64 offsets (n + 1)."""
        ...

    @property
    def bytes_of_tokens(self) -> list[bytes]:
        """The bytes of each id: of a special token its content's UTF-8, of an unused id none."""
        ...

    def encode_segments(
        self, segments: list[tuple[str, bool]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode segments (text, whether it is a control token) of a chat.

        Return the ids and the range of characters of each in the joined segments.
        """
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD."""
        text = join_bytes(self, ids, skip_special).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes; XinslmError if it is not in the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise XinslmError(
                f"token id {token} is not in 0..{self.vocab_size - 1}: these ids were made with "
                "another tokenizer"
            )
        return self.bytes_of_tokens[token]

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Turn a chat into ids and a loss mask: 1 on the assistant's content and end token."""
        from xinslm.tokenizer.chat import encode_chat  # which needs this module

        return encode_chat(self, messages, add_generation_prompt)

    def fingerprint(self) -> str:
        """Return a hash that two tokenizers share if and only if the same ids mean the same."""
        ...

    def save(self, path: Path) -> None:
        """Write the files that `transformers.AutoTokenizer` loads into folder `path`."""
        ...


def clean_surrogates(text: str) -> str:
    """Replace lone surrogates by U+FFFD, because UTF-8 cannot hold them; join split pairs."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def id_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


def join_bytes(tokenizer: Tokenizer, ids: Iterable[int], skip_special: bool) -> bytes:
    """Concatenate the bytes of tokens, with or without the control tokens."""
    skip = set(tokenizer.special_tokens.values()) if skip_special else set()
    return b"".join(tokenizer.token_bytes(token) for token in ids if token not in skip)


def fingerprint(tokenizer: Tokenizer, split_rule: str) -> str:
    """Hash what ids mean: their bytes, control tokens, BOS / EOS / pad, and the split rule."""
    meaning = {
        "bytes": [tokenizer.token_bytes(token).hex() for token in range(tokenizer.vocab_size)],
        "special": sorted(tokenizer.special_tokens.values()),
        "roles": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id],
        "split": split_rule,
    }
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


class StreamDecoder:
    """Turns ids into text as they arrive; bytes of an incomplete character wait for the rest.

    decoder = StreamDecoder(tokenizer)
    for token in tokens:
        print(decoder.add(token), end="")
    print(decoder.finish())
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, at_start: bool = True):
        """`at_start` is False if the text continues a prompt that was already shown."""
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._strip = tokenizer.strips_first_space and at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, *tokens: int) -> str:
        """Add tokens and return the text that they complete, which may be empty."""
        return self._text(join_bytes(self._tokenizer, tokens, self._skip), False)

    def finish(self) -> str:
        """Return U+FFFD if the last character is incomplete, else nothing."""
        return self._text(b"", True)

    def _text(self, data: bytes, final: bool) -> str:
        text = self._utf8.decode(data, final)
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text


def check_vocabulary(rows: int, tokenizer: Tokenizer, name: str) -> None:
    """Raise XinslmError if the tokenizer has more ids than the model's embedding has rows."""
    if tokenizer.vocab_size > rows:
        raise XinslmError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} ids, but the model's embedding "
            f"only {rows:,} rows; the tokenizer belongs to another model"
        )
