"""Reads the tokenizer in a GGUF file's `tokenizer.ggml.*` keys.

"gpt2" is byte-level BPE with llama.cpp's name of the split rule; "llama" is sentencepiece, whose
scores give the merges. Other kinds (WordPiece, Unigram, RWKV) and split rules are refused: their
ids would be wrong.
"""

from enum import IntEnum
from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.files import Definition
from xinslm.tokenizer.start import start_processor


class TokenType(IntEnum):
    """llama.cpp's kinds of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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


def _read(keys: dict[str, Any], where: str) -> Tokenizer:
    engine, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    if not tokens:
        raise XinslmError("it contains no tokenizer")
    types = keys.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens):
        raise XinslmError(f"its tokenizer has {len(tokens):,} tokens, but {len(types):,} types")
    named = {}
    for role, key in _ROLES.items():
        token = keys.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and 0 <= int(token) < len(tokens):
            named[role] = tokens[int(token)]
    template = keys.get("tokenizer.chat_template")
    if engine == "gpt2":
        return _byte_level(keys, tokens, types, named, template)
    if engine == "llama":
        return _sentencepiece(keys, tokens, types, named, template, where)
    raise XinslmError(f"it has a tokenizer of kind {engine!r}, which is not supported")


def _byte_level(
    keys: dict[str, Any],
    tokens: list[str],
    types: list[int],
    named: dict[str, str],
    template: str | None,
) -> BPETokenizer:
    pre = keys.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise XinslmError(f"its split rule '{pre}' is not supported ({', '.join(_SPLITS)} are)")
    kinds = np.array(types)
    if unknown := set(types) - set(TokenType):
        raise ValueError(f"token type {min(unknown)}")
    vocab = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1
    }
    control, added = (
        {tokens[i]: i for i in np.flatnonzero(kinds == kind).tolist()}
        for kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    )
    last = max(vocab.values(), default=-1)
    # tokenizer.json numbers tokens outside its vocabulary after those in it
    inner = {token: index for token, index in (control | added).items() if index < last}
    pairs = [tuple(merge.split(" ")) for merge in keys.get("tokenizer.ggml.merges") or []]
    merges = [
        (left, right)
        for left, right in pairs
        if left in vocab and right in vocab and left + right in vocab
    ]
    definition = Definition(
        vocab=vocab | inner,
        merges=merges,
        special_tokens=control,
        added_tokens=added,
        split=_SPLITS[pre],
        ignore_merges=_SPLITS[pre] == "llama-bpe",
        named_tokens=named,
        chat_template=template,
        post_processor=_start(keys, named, tokens, _SPLITS[pre] == "llama-bpe"),
    )
    return BPETokenizer.of(definition)


def _start(
    keys: dict[str, Any], named: dict[str, str], tokens: list[str], default: bool
) -> dict[str, Any] | None:
    """Return the post-processor for `add_bos_token`; `default` is llama.cpp's if it is missing."""
    bos = named.get("bos_token")
    if bos is None or not keys.get("tokenizer.ggml.add_bos_token", default):
        return None
    return start_processor(bos, tokens.index(bos))


def _sentencepiece(
    keys: dict[str, Any],
    tokens: list[str],
    types: list[int],
    named: dict[str, str],
    template: str | None,
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
    content["post_processor"] = _start(keys, named, tokens, True)
    return HFTokenizer(content, named, template, where)
