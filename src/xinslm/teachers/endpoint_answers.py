"""Parses and validates the responses of OpenAI-compatible servers.

`prompt_logprobs` is vLLM's: for each token of the prompt but the first, an object from token ids to
`logprob`, `rank` and `decoded_token`. It contains the n most likely tokens, and the prompt's token
if it is not one of them. Generated text has `logprobs.content` (chat, and llama.cpp's completions)
or the older lists `tokens`, `token_logprobs`, `top_logprobs` (completions). Minus infinity is
encoded as -9999.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from xinslm.errors import XinslmError
from xinslm.teachers.base import Generation
from xinslm.tokenizer.alphabet import unspell

SLACK = 1e-3
"""Tolerance for rounding: of log-probabilities above 0, and of sums of probabilities above 1."""


@dataclass(frozen=True)
class Scored:
    """The n most likely tokens at each of N positions of a given text, and the labels."""

    ids: np.ndarray
    """(N, n) int64, most likely first."""
    log_probs: np.ndarray
    """(N, n) float64."""
    label_log_probs: np.ndarray
    """(N,) float64, of the tokens of the text."""


def first_choice(answer: Any) -> dict[str, Any]:
    """Return the first of a response's `choices`."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise XinslmError(
            "the response has no 'choices'; the server does not implement OpenAI's API"
        )
    return choices[0]


def prompt_scores(choice: dict[str, Any], ids: np.ndarray, count: int, tokenizer: Any) -> Scored:
    """Parse `prompt_logprobs` of the prompt `ids` (N + 1,): scores of each position after the
    first.

    XinslmError names the token if the positions differ from those sent, there are fewer than
    `count` entries, the vocabulary is another, or numbers are not log-probabilities.
    """
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise XinslmError("the response has no 'prompt_logprobs'")
    if len(entries) != len(ids):
        raise XinslmError(
            f"the response has {len(entries)} tokens, but {len(ids)} were sent: the server removes "
            "or adds tokens"
        )
    n = len(ids) - 1
    top_ids, top = np.empty((n, count), np.int64), np.empty((n, count))
    labels = np.empty(n)
    for place in range(n):
        try:
            likely, own = _place(entries[place + 1], int(ids[place + 1]), tokenizer)
        except XinslmError as error:
            raise XinslmError(f"token {place + 1}: {error}") from None
        if len(likely) < count:
            raise XinslmError(
                f"token {place + 1}: the response has {len(likely)} log-probabilities, but {count} "
                "were requested; pass a smaller --top-k, or raise the server's limit (vLLM: "
                "--max-logprobs)"
            )
        top_ids[place] = [token for token, _ in likely[:count]]
        top[place] = [value for _, value in likely[:count]]
        labels[place] = own
    _require_mass(np.exp(top).sum(axis=1))
    return Scored(top_ids, top, labels)


def _place(entry: Any, label: int, tokenizer: Any) -> tuple[list[tuple[int, float]], float]:
    """Return (id, log p) of one position, most likely first, and log p of the label.

    A label that is not among the n most likely sorts after them, so the first n are the requested
    ones.
    """
    if not isinstance(entry, dict) or not entry:
        raise XinslmError("it has no log-probabilities")
    values: list[tuple[int, float]] = []
    own = None
    for key, facts in entry.items():
        token = int(key) if str(key).isdigit() else -1
        if not 0 <= token < tokenizer.vocab_size:
            raise XinslmError(
                f"token id {key!r} is not in the tokenizer's {tokenizer.vocab_size:,} ids: the "
                "server's model has another vocabulary. Pass its tokenizer with "
                "--teacher-tokenizer-path"
            )
        value = number(facts.get("logprob") if isinstance(facts, dict) else facts)
        decoded = facts.get("decoded_token") if isinstance(facts, dict) else None
        if isinstance(decoded, str):
            _require_same_token(token, decoded, tokenizer)
        if token == label:
            own = value
        values.append((token, value))
    if own is None:
        raise XinslmError(f"the response does not include the token that was sent, {label}")
    return sorted(values, key=lambda pair: -pair[1]), own


def _require_same_token(token: int, decoded: str, tokenizer: Any) -> None:
    """Compare the server's text of a token with our tokenizer's; some versions spell a space as
    'Ġ'.
    """
    ours = tokenizer.token_bytes(token)
    if token in tokenizer.special_tokens.values() or not decoded or "\ufffd" in decoded:
        return
    spelled = unspell(decoded)
    plain = decoded.replace("▁", " ").encode("utf-8", "replace")
    if ours in (decoded.encode("utf-8", "replace"), spelled, plain) or ours.strip(
        b" "
    ) == plain.strip(b" "):
        return
    if decoded.startswith("<0x") and len(ours) == 1 and decoded[3:5].upper() == ours.hex().upper():
        return
    try:
        ours.decode()
    except UnicodeDecodeError:
        return  # part of a character: servers spell it in many different forms
    raise XinslmError(
        f"token id {token} is {decoded!r} on the server and {ours.decode()!r} in our tokenizer: "
        "the vocabularies differ. Pass the tokenizer of the server's model with "
        "--teacher-tokenizer-path"
    )


def number(value: Any) -> float:
    """Return `value` as a log-probability: finite or minus infinity, and at most 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise XinslmError(f"a log-probability is {value!r}, but must be a number")
    if math.isnan(value) or value > SLACK:
        raise XinslmError(f"a log-probability is {value}, but must be at most 0")
    return min(float(value), 0.0)


def _require_mass(sums: np.ndarray) -> None:
    if len(sums) and float(sums.max()) > 1 + 10 * SLACK:
        place = int(sums.argmax()) + 1
        raise XinslmError(
            f"token {place}: the probabilities sum to {float(sums.max()):.3f}, more than 1; the "
            "server may have applied a temperature (vLLM: leave --logprobs-mode at raw_logprobs)"
        )


def generation(choice: dict[str, Any], tokenizer: Any = None) -> Generation | None:
    """Parse a generated answer with its log-probabilities; None if the model refused to answer.

    llama.cpp also returns token ids; with the tokenizer they give the bytes of tokens that are part
    of a character.
    """
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    refused = isinstance(message, dict) and message.get("refusal")
    reason = choice.get("finish_reason")
    if refused or reason == "content_filter":
        return None
    if text is not None and not isinstance(text, str):
        raise XinslmError(f"the answer's text is {text!r:.60}, but must be a string")
    tokens, values, top = _tokens(choice.get("logprobs"), tokenizer)
    return Generation(text or "", tokens, values, top, reason == "stop")


def _tokens(
    logprobs: Any, tokenizer: Any
) -> tuple[list[bytes], list[float], list[list[tuple[bytes, float]]]]:
    """Return bytes, log p and alternatives of each token from either form; empty if missing."""
    if not isinstance(logprobs, dict):
        return [], [], []
    content = logprobs.get("content")
    if isinstance(content, list):
        rows = [
            (_bytes(row, tokenizer), row.get("logprob"), row.get("top_logprobs") or [])
            for row in map(_object, content)
        ]
        tops = [
            [
                (_bytes(_object(rival), tokenizer), number(_object(rival).get("logprob")))
                for rival in top
            ]
            for *_, top in rows
        ]
    else:
        names, likely = logprobs.get("tokens") or [], logprobs.get("top_logprobs") or []
        chances = logprobs.get("token_logprobs") or []
        if not all(isinstance(part, list) for part in (names, likely, chances)) or len(
            names
        ) != len(chances):
            raise XinslmError(
                "'logprobs' has no 'content' and its lists 'tokens' and "
                "'token_logprobs' do not match"
            )
        rows = [(str(name).encode(), value, []) for name, value in zip(names, chances, strict=True)]
        tops = [
            [
                (str(name).encode(), number(value))
                for name, value in (_object(row) if row else {}).items()
            ]
            for row in likely
        ]
    for top in tops:
        top.sort(key=lambda pair: -pair[1])
    _require_mass(np.array([sum(math.exp(value) for _, value in top) for top in tops]))
    if len(tops) != len(rows):
        tops = [[] for _ in rows]
    return [data for data, *_ in rows], [number(value) for _, value, _ in rows], tops


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise XinslmError(f"'logprobs' contains {value!r:.60}, but must contain an object")
    return value


def _bytes(row: dict[str, Any], tokenizer: Any) -> bytes:
    """Return a token's bytes: by its id if the server sends one, else its bytes or text."""
    data, token = row.get("bytes"), row.get("id")
    has_bytes = isinstance(data, list) and all(
        isinstance(byte, int) and 0 <= byte < 256 for byte in data
    )
    found = bytes(data or ()) if has_bytes else str(row.get("token", "")).encode("utf-8", "replace")
    if tokenizer is None or not isinstance(token, int):
        return found
    own: bytes = tokenizer.token_bytes(token) if 0 <= token < tokenizer.vocab_size else b"\xff"
    if found in (b"", own) or token in tokenizer.special_tokens.values():
        return own
    # llama.cpp holds back part of a character and sends it with the token that completes it.
    if token < tokenizer.vocab_size and (
        found.endswith(own) or own.decode("utf-8", "ignore").encode() != own
    ):
        return found
    raise XinslmError(
        f"token id {token} is {found!r} on the server and differs in our tokenizer: the "
        "vocabularies differ. Pass the tokenizer of the server's model with "
        "--teacher-tokenizer-path"
    )
