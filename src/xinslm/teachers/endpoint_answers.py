"""What OpenAI-compatible servers answer, read and checked: nothing of it is trusted before it is.

`prompt_logprobs` is vLLM's: for each token of the prompt, but the first, an object from token ids
to `logprob`, `rank` and `decoded_token`, that holds the n most likely and the token that came, also
where that is not among them. Generated text has `logprobs.content` (chat, and llama.cpp's
completions) or the older lists `tokens`, `token_logprobs`, `top_logprobs` (completions). Minus
infinity is written as -9999.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from xinslm.errors import XinslmError
from xinslm.teachers.base import Generation
from xinslm.tokenizer.alphabet import unspell

SLACK = 1e-3
"""How far above 0 rounding may lift a log-probability, and above 1 a sum of probabilities."""


@dataclass(frozen=True)
class Scored:
    """The n most likely tokens at each place of a given text, and the token that came; N places."""

    ids: np.ndarray
    """(N, n) int64, most likely first."""
    log_probs: np.ndarray
    """(N, n) float64."""
    label_log_probs: np.ndarray
    """(N,) float64, of the token that came."""


def first_choice(answer: Any) -> dict[str, Any]:
    """The first of an answer's `choices`."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise XinslmError(
            "the answer has no 'choices'; the server does not speak OpenAI's protocol"
        )
    return choices[0]


def prompt_scores(choice: dict[str, Any], ids: np.ndarray, count: int, tokenizer: Any) -> Scored:
    """Read `prompt_logprobs` for the prompt `ids` (N + 1,): what was likely at each place behind
    the first.

    XinslmError for other positions than were sent, fewer than `count` entries, another vocabulary,
    and numbers that are no log-probabilities; it names the token.
    """
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise XinslmError("the answer has no 'prompt_logprobs'")
    if len(entries) != len(ids):
        raise XinslmError(
            f"the answer speaks of {len(entries)} tokens where {len(ids)} were sent: the server "
            "cuts or adds tokens"
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
                f"token {place + 1}: {len(likely)} log-probabilities came where {count} were "
                "asked for; take a smaller "
                f"--top-k, or let the server give more (vLLM: --max-logprobs)"
            )
        top_ids[place] = [token for token, _ in likely[:count]]
        top[place] = [value for _, value in likely[:count]]
        labels[place] = own
    _require_mass(np.exp(top).sum(axis=1))
    return Scored(top_ids, top, labels)


def _place(entry: Any, label: int, tokenizer: Any) -> tuple[list[tuple[int, float]], float]:
    """(id, log p) of one place, most likely first, and log p of the token that came.

    Where that one is not among the n most likely it stands behind them, so the first n are what was
    asked for.
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
                "server's model has "
                f"another vocabulary. Give its tokenizer with --teacher-tokenizer-path"
            )
        value = number(facts.get("logprob") if isinstance(facts, dict) else facts)
        decoded = facts.get("decoded_token") if isinstance(facts, dict) else None
        if isinstance(decoded, str):
            _require_same_token(token, decoded, tokenizer)
        if token == label:
            own = value
        values.append((token, value))
    if own is None:
        raise XinslmError(f"the token that was sent, {label}, is not among the answer's")
    return sorted(values, key=lambda pair: -pair[1]), own


def _require_same_token(token: int, decoded: str, tokenizer: Any) -> None:
    """Compare what the server says a token is with what our tokenizer says; some versions write a
    space as 'Ġ'.
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
        return  # part of a character: servers write it in a dozen ways
    raise XinslmError(
        f"token id {token} is {decoded!r} to the server and {ours.decode()!r} to our tokenizer: "
        "the vocabularies "
        f"differ. Give the tokenizer of the server's model with --teacher-tokenizer-path"
    )


def number(value: Any) -> float:
    """A log-probability: finite, or minus infinity, and not above 0."""
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
            "server may have "
            f"applied a temperature (vLLM: leave --logprobs-mode at raw_logprobs)"
        )


def generation(choice: dict[str, Any], tokenizer: Any = None) -> Generation | None:
    """Read a generated answer with its log-probabilities; None where the model refused to answer.

    llama.cpp tells tokens' ids, too: with the tokenizer they give the bytes of tokens that are half
    a character.
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
    """Bytes, log p and rivals of each token, from either form; nothing where there is none."""
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
        raise XinslmError(f"'logprobs' holds {value!r:.60} where an object is due")
    return value


def _bytes(row: dict[str, Any], tokenizer: Any) -> bytes:
    """A token's bytes, by its id where that is told and known; servers that give none give its
    text.
    """
    data, token = row.get("bytes"), row.get("id")
    told = isinstance(data, list) and all(
        isinstance(byte, int) and 0 <= byte < 256 for byte in data
    )
    found = bytes(data or ()) if told else str(row.get("token", "")).encode("utf-8", "replace")
    if tokenizer is None or not isinstance(token, int):
        return found
    own: bytes = tokenizer.token_bytes(token) if 0 <= token < tokenizer.vocab_size else b"\xff"
    if found in (b"", own) or token in tokenizer.special_tokens.values():
        return own
    # llama.cpp holds back half a character and tells it with the token that completes it.
    if token < tokenizer.vocab_size and (
        found.endswith(own) or own.decode("utf-8", "ignore").encode() != own
    ):
        return found
    raise XinslmError(
        f"token id {token} is {found!r} to the server and another to our tokenizer: the "
        "vocabularies differ. Give the "
        f"tokenizer of the server's model with --teacher-tokenizer-path"
    )
