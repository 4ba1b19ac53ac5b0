"""`HFTokenizer`: any other Hugging Face tokenizer, unchanged, with the same interface.

The `tokenizers` library runs the tokenizer.json; a sentencepiece .model is converted to one first
(sentencepiece.py). The vocabulary must be byte-level or sentencepiece, because every token must
have bytes.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer as Backend

from xinslm.errors import UsageError, XinslmError
from xinslm.files import write_text
from xinslm.tokenizer import base, files, sentencepiece
from xinslm.tokenizer.alphabet import unspell
from xinslm.tokenizer.start import start_ids

_BATCH_TEXTS = 1024
_BYTE = regex.compile(r"<0x([0-9A-F]{2})>")


class HFTokenizer(base.Tokenizer):
    """A tokenizer.json that the `tokenizers` library runs."""

    def __init__(
        self,
        content: dict[str, Any],
        named_tokens: dict[str, str],
        chat_template: str | None,
        source: str,
    ):
        """`content` is a parsed tokenizer.json; `source` names it in messages."""
        self.definition_json = content
        self.named_tokens = named_tokens
        self.chat_template = chat_template
        try:
            self._backend = Backend.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare Exceptions
            raise XinslmError(
                f"{source}: the tokenizers library refuses this file: {error}"
            ) from None
        self._family = _family(content)
        if self._family is None:
            raise XinslmError(
                f"{source}: tokens of this {content['model'].get('type')} tokenizer have no bytes; "
                "byte-level and sentencepiece tokenizers are supported"
            )
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        self._added = {index: token.content for index, token in added.items()}
        roles = (self._vocab.get(named_tokens.get(name, "")) for name in files.NAMES[:3])
        self.bos_id, self.eos_id, self.pad_id = roles
        try:
            self.start_ids = start_ids(content.get("post_processor"), self.vocab_size)
        except ValueError as error:
            raise XinslmError(f"{source}: {error}") from None
        self.strips_first_space = self._strips_first_space()

    @classmethod
    def load(cls, path: Path) -> "HFTokenizer":
        """Read a folder, a tokenizer.json, or a sentencepiece .model (also alone in a folder)."""
        folder = path if path.is_dir() else path.parent
        named, template, _ = files.read_config(folder)
        if path.is_dir() and not (path / files.TOKENIZER).is_file():
            models = sorted(path.glob("*.model"))
            if len(models) != 1:
                raise UsageError(
                    f"{path} contains no {files.TOKENIZER} and {len(models)} .model files; it must "
                    "contain exactly one"
                )
            path = models[0]
        if path.suffix == ".model":
            content, defaults = sentencepiece.translate(path)
            return cls(content, defaults | named, template, str(path))
        file = path / files.TOKENIZER if path.is_dir() else path
        return cls(files.read_tokenizer_json(file), named, template, str(file))

    def save(self, path: Path | str) -> None:
        """Write the unchanged tokenizer.json, our tokenizer_config.json, and the chat template."""
        text = json.dumps(self.definition_json, ensure_ascii=False, separators=(",", ":"))
        write_text(Path(path) / files.TOKENIZER, text + "\n")
        files.write_config(Path(path), self.named_tokens, self.chat_template, {})

    def encode(self, text: str, allowed_special: bool = False) -> list[int]:
        """Turn text into ids; with `allowed_special` control tokens in it become their ids."""
        self._backend.encode_special_tokens = not allowed_special
        clean = base.clean_surrogates(text)
        return list(self._backend.encode(clean, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts into flat ids and offsets: text i is `ids[offsets[i]:offsets[i + 1]]`."""
        self._backend.encode_special_tokens = True
        parts, dtype = list[np.ndarray](), base.id_dtype(self.vocab_size)
        for start in range(0, len(texts), _BATCH_TEXTS):
            batch = [base.clean_surrogates(text) for text in texts[start : start + _BATCH_TEXTS]]
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.array(encoding.ids, dtype) for encoding in encodings]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return np.concatenate([np.zeros(0, dtype), *parts]), offsets

    @cached_property
    def bytes_of_tokens(self) -> list[bytes]:
        """The bytes of each id."""
        table = [b""] * self.vocab_size
        for content, index in self._vocab.items():
            if index in self._added:
                table[index] = self._added[index].encode()
            elif self._family == "byte-level":
                spelled = unspell(content)
                table[index] = content.encode() if spelled is None else spelled
            elif byte := _BYTE.fullmatch(content):
                table[index] = bytes.fromhex(byte[1])
            else:
                table[index] = content.replace("▁", " ").encode()
        return table

    def _strips_first_space(self) -> bool:
        ids = self._backend.encode("x", add_special_tokens=False).ids
        return base.join_bytes(self, ids, False) == b" x" and self._backend.decode(ids) == "x"

    def encode_segments(
        self, segments: list[tuple[str, bool]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode in one call, as transformers does, unless a message holds a control token."""
        ordinary = [text for text, is_control in segments if not is_control]
        if not any(content in text for content in self.special_tokens for text in ordinary):
            segments = [("".join(text for text, _ in segments), True)]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for text, parse in segments:
            self._backend.encode_special_tokens = not parse
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids += encoding.ids
            spans += [(start + begin, start + end) for begin, end in encoding.offsets]
            start += len(text)
        return ids, spans

    def fingerprint(self) -> str:
        """Return a hash that two tokenizers share if and only if the same ids mean the same."""
        rules = {key: self.definition_json.get(key) for key in ("normalizer", "pre_tokenizer")}
        return base.fingerprint(self, json.dumps(rules, sort_keys=True))


def _family(content: dict[str, Any]) -> str | None:
    """Return how tokens spell bytes: 'byte-level', 'sentencepiece', or None if neither."""
    decoder = content.get("decoder") or {}
    steps = [decoder, *(decoder.get("decoders") or [])]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return "byte-level"
    replaces = any(
        step.get("type") == "Metaspace"
        or (step.get("type") == "Replace" and step.get("pattern") == {"String": "▁"})
        for step in steps
    )
    return "sentencepiece" if replaces else None
