"""Reads the tokenizer in a GGUF file's `tokenizer.ggml.*` keys.

"gpt2" is byte-level BPE with llama.cpp's name of the split rule; "llama" is sentencepiece, whose
scores give the merges. Other kinds (WordPiece, Unigram, RWKV) and split rules are refused: their
ids would be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.gguf_file import Strings
from xinslm.native.bpe import NativeEncoder
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.files import NAMES, Definition, Outline
from xinslm.tokenizer.start import start_ids, start_processor


class TokenType(IntEnum):
    """llama.cpp's kinds of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
_SAME_SPLIT = {
    "llama-bpe": "llama-bpe llama-v3 llama3 falcon3 pixtral lfm2",
    "gpt-2": "gpt-2 phi-2 mpt jina-v2-code gigachat",
    "qwen2": "qwen2 deepseek-r1-qwen stablelm2 megrez",
    "smollm": "smollm starcoder refact command-r codeshell exaone",
}
"""llama.cpp's names for each split rule, verified against llama.cpp itself."""
_SPLITS = {name: split for split, names in _SAME_SPLIT.items() for name in names.split()}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_tokenizer(keys: dict[str, Any], where: str) -> Tokenizer:
    """Build the tokenizer from a GGUF's keys; UsageError names the options that replace it."""
    try:
        return _read(keys, where)
    except XinslmError as error:
        problem = str(error)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        problem = f"its tokenizer is damaged ({error!r})"
    raise UsageError(
        f"{where}: {problem}. Pass the model's tokenizer with --teacher-tokenizer-path, or make "
        "a folder with it: xinslm import FILE --tokenizer-path TOKENIZER -o FOLDER"
    )


@dataclass(frozen=True)
class _Vocabulary:
    """The arrays and settings of a byte-level vocabulary in a file."""

    keys: dict[str, Any]
    tokens: Sequence[str]
    kinds: np.ndarray
    """`TokenType` of each token, int32."""
    roles: dict[str, int]
    """Ids of the tokens that have a role, by its name."""
    split: str

    @property
    def named(self) -> dict[str, str]:
        """Contents of the tokens that have a role."""
        contents = _pick(self.tokens, list(self.roles.values()))
        return {role: contents[token] for role, token in self.roles.items()}

    def of_kind(self, kind: TokenType) -> dict[str, int]:
        """Tokens of a kind, to ids; of two equal ones the last counts."""
        contents = _pick(self.tokens, np.flatnonzero(self.kinds == kind).tolist())
        return {content: index for index, content in contents.items()}

    @property
    def start(self) -> dict[str, Any] | None:
        """The post-processor."""
        return _start(self.keys, self.named, self.split == "llama-bpe")


def _read(keys: dict[str, Any], where: str) -> Tokenizer:
    engine, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    if not tokens:
        raise XinslmError("it contains no tokenizer")
    types = keys.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens):
        raise XinslmError(f"its tokenizer has {len(tokens):,} tokens, but {len(types):,} types")
    roles = {}
    for role, key in _ROLES.items():
        token = keys.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and 0 <= int(token) < len(tokens):
            roles[role] = int(token)
    if engine == "gpt2":
        return _byte_level(keys, tokens, types, roles)
    if engine == "llama":
        named = {role: tokens[token] for role, token in roles.items()}
        return _sentencepiece(keys, tokens, types, named, where)
    raise XinslmError(f"it has a tokenizer of kind {engine!r}, which is not supported")


def _pick(tokens: Sequence[str], places: list[int]) -> dict[int, str]:
    """The tokens at some places, in their order."""
    if isinstance(tokens, Strings):
        return tokens.pick(places)
    return {place: tokens[place] for place in sorted(places)}


def _byte_level(
    keys: dict[str, Any], tokens: Sequence[str], types: list[int], roles: dict[str, int]
) -> BPETokenizer:
    pre = keys.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise XinslmError(f"its split rule '{pre}' is not supported ({', '.join(_SPLITS)} are)")
    if unknown := set(types) - set(TokenType):
        raise ValueError(f"token type {min(unknown)}")
    found = _Vocabulary(keys, tokens, np.array(types, np.int32), roles, _SPLITS[pre])
    return _in_library(found) or BPETokenizer.of(_define(found))


def _in_library(found: _Vocabulary) -> BPETokenizer | None:
    """The tokenizer without a Python string for each token and merge; None if there is no library,
    or if it leaves the vocabulary to `_define`.
    """
    tokens, merges = found.tokens, found.keys.get("tokenizer.ggml.merges")
    if not isinstance(tokens, Strings) or not isinstance(merges, Strings):
        return None
    control, added = map(found.of_kind, (TokenType.CONTROL, TokenType.USER_DEFINED))
    if len(control | added) < np.isin(found.kinds, _ADDED).sum():
        return None
    encoder = NativeEncoder.of_gguf(tokens.raw, found.kinds, (merges.raw, len(merges)), found.split)
    if encoder is None:
        return None
    used = np.isin(found.kinds, (TokenType.NORMAL, *_ADDED))
    size = int(np.flatnonzero(used)[-1]) + 1
    roles = [found.roles.get(name) for name in NAMES[:3]]
    outline = Outline(
        vocab_size=size,
        special_tokens=control,
        added_tokens=added,
        split=found.split,
        named_tokens=found.named,
        roles=[None if role is None or not used[role] else role for role in roles],
        start_ids=start_ids(found.start, size),
        chat_template=found.keys.get("tokenizer.chat_template"),
        normalizer=None,
    )
    return BPETokenizer.of_encoder(encoder, outline, partial(_define, found))


def _define(found: _Vocabulary) -> Definition:
    vocab = {
        token: index
        for index, (token, kind) in enumerate(zip(found.tokens, found.kinds.tolist(), strict=True))
        if kind == TokenType.NORMAL
    }
    control, added = map(found.of_kind, (TokenType.CONTROL, TokenType.USER_DEFINED))
    last = max(vocab.values(), default=-1)
    # tokenizer.json numbers tokens outside its vocabulary after those in it
    inner = {token: index for token, index in (control | added).items() if index < last}
    pairs = [tuple(merge.split(" ")) for merge in found.keys.get("tokenizer.ggml.merges") or []]
    merges = [
        (left, right)
        for left, right in pairs
        if left in vocab and right in vocab and left + right in vocab
    ]
    return Definition(
        vocab=vocab | inner,
        merges=merges,
        special_tokens=control,
        added_tokens=added,
        split=found.split,
        ignore_merges=found.split == "llama-bpe",
        named_tokens=found.named,
        chat_template=found.keys.get("tokenizer.chat_template"),
        post_processor=found.start,
    )


def _start(keys: dict[str, Any], named: dict[str, str], default: bool) -> dict[str, Any] | None:
    """Return the post-processor for `add_bos_token`; `default` is llama.cpp's if it is missing."""
    if "bos_token" not in named or not keys.get("tokenizer.ggml.add_bos_token", default):
        return None
    return start_processor(named["bos_token"], int(keys["tokenizer.ggml.bos_token_id"]))


def _sentencepiece(
    keys: dict[str, Any],
    tokens: list[str],
    types: list[int],
    named: dict[str, str],
    where: str,
) -> Tokenizer:
    # imported here, because a byte-level tokenizer needs none of it
    from xinslm.tokenizer import sentencepiece
    from xinslm.tokenizer.hf import HFTokenizer

    scores = keys.get("tokenizer.ggml.scores")
    if scores is None or "unk_token" not in named:
        raise XinslmError("its pieces have no scores or no unknown token")
    pieces = [
        (token, int(kind), float(score))
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind != TokenType.UNUSED
    ]
    if len(pieces) != len(tokens) and any(
        kind == TokenType.UNUSED for kind in types[: len(pieces)]
    ):
        raise XinslmError("it has unused ids between used ones")
    content = sentencepiece.to_tokenizer_json(
        pieces,
        tokens.index(named["unk_token"]),
        any(kind == TokenType.BYTE for kind in types),
        bool(keys.get("tokenizer.ggml.add_space_prefix", True)),
        bool(keys.get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )
    content["post_processor"] = _start(keys, named, True)
    return HFTokenizer(content, named, keys.get("tokenizer.chat_template"), where)
