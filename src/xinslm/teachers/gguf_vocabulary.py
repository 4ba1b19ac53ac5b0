"""Reads the tokenizer in a GGUF file's `tokenizer.ggml.*` keys.

"gpt2" is byte-level BPE with llama.cpp's name of the split rule; "llama" is sentencepiece, whose
scores give the merges. Other kinds (WordPiece, Unigram, RWKV) and split rules are refused: their
ids would be wrong.
"""

from typing import Any

from gguf import TokenType

from xinslm.errors import UsageError, XinslmError
from xinslm.tokenizer import sentencepiece
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.files import Definition
from xinslm.tokenizer.hf import HFTokenizer
from xinslm.tokenizer.start import start_processor

_SPLITS = {
    "llama-bpe": "llama-bpe",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "gpt-2": "gpt-2",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_tokenizer(keys: dict[str, Any], where: str) -> Any:
    """Build the tokenizer from a GGUF's keys; UsageError names --teacher-tokenizer-path."""
    engine, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    types = keys.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens or ())
    if not tokens or len(types) != len(tokens):
        raise UsageError(
            f"{where} contains no tokenizer; pass the model's with --teacher-tokenizer-path"
        )
    named = {}
    for role, key in _ROLES.items():
        token = keys.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and 0 <= int(token) < len(tokens):
            named[role] = tokens[int(token)]
    template = keys.get("tokenizer.chat_template")
    try:
        if engine == "gpt2":
            return _byte_level(keys, tokens, types, named, template)
        if engine == "llama":
            return _sentencepiece(keys, tokens, types, named, template, where)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, XinslmError):
            raise UsageError(
                f"{where}: {error}. Pass the model's own tokenizer with --teacher-tokenizer-path"
            ) from None
        raise UsageError(
            f"{where}: its tokenizer is damaged ({error!r}); pass the model's with "
            "--teacher-tokenizer-path"
        ) from None
    raise UsageError(
        f"{where} has a tokenizer of kind {engine!r}, which is not supported; pass the model's "
        "with --teacher-tokenizer-path"
    )


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
    by_type: dict[int, dict[str, int]] = {kind: {} for kind in TokenType}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        by_type[kind][token] = index
    vocab = by_type[TokenType.NORMAL]
    merges = []
    for merge in keys.get("tokenizer.ggml.merges") or []:
        left, right = merge.split(" ")
        if left in vocab and right in vocab and left + right in vocab:
            merges.append((left, right))
    definition = Definition(
        vocab=vocab,
        merges=merges,
        special_tokens=by_type[TokenType.CONTROL],
        added_tokens=by_type[TokenType.USER_DEFINED],
        split=_SPLITS[pre],
        ignore_merges=_SPLITS[pre] == "llama-bpe",
        named_tokens=named,
        chat_template=template,
        post_processor=_start(keys, named, tokens, pre in ("llama-bpe", "llama-v3", "llama3")),
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
) -> HFTokenizer:
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
