"""The loop in which a local teacher writes answers: a batch at a time, with a key-value cache, no
padding.

Prompts of different lengths share a batch from the length of the shortest on: each further step
feeds a row its own prompt's next token as long as it has one, and what was drawn after that. So no
row ever holds a pad, and any causal model that keeps a cache will do. Draws come from a
counter-based generator by seed, key and token number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.teachers.base import Generation, Prompt, Sampling
from xinslm.tokenizer.base import StreamDecoder
from xinslm.tokenizer.chat import end_ids
from xinslm.tokenizer.start import document_start

Step = Callable[[np.ndarray], Tensor]
"""Takes a token for each row, (B,) int64, gives the logits of the next, (B, V) float32."""
Begin = Callable[[np.ndarray, int], tuple[Tensor, Step]]
"""Takes ids (B, T) and the number of tokens that may follow."""


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A text behind what documents begin with; or a chat up to where the answer begins."""
    if not isinstance(prompt, str):
        messages = [dict(message) for message in prompt]
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)[0]
        return ids
    ids = document_start(tokenizer) + tokenizer.encode(prompt)
    if not ids:
        raise UsageError(
            "a prompt is empty, and the tokenizer has no BOS or EOS token to start from"
        )
    return ids


def write(
    begin: Begin,
    tokenizer: Any,
    max_length: int,
    name: str,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    sampling: Sampling,
) -> list[Generation]:
    """Answer prompts in one batch; an answer ends with an end token, at the limit, or where the
    context is full.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    lengths = np.array([len(row) for row in rows])
    if lengths.max() >= max_length:
        raise UsageError(
            f"a prompt has {lengths.max():,} tokens, the context of teacher {name} is "
            f"{max_length:,} with the answer; "
            f"shorten it"
        )
    ends = np.array(sorted(end_ids(tokenizer)), np.int64)
    limits = np.minimum(lengths + sampling.max_new_tokens, max_length)
    shortest, total = int(lengths.min()), int(limits.max())
    ids = np.zeros((len(rows), total), np.int64)
    log_probs = np.zeros((len(rows), total))
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    until, finished = limits.copy(), np.zeros(len(rows), bool)
    logits, step = begin(ids[:, :shortest], total - shortest)
    for at in range(shortest, total):
        writing = (lengths <= at) & (at < until)
        if writing.any():
            drawn, likelihood = draw(logits, np.asarray(keys), at - lengths, sampling, name)
            ids[writing, at], log_probs[writing, at] = drawn[writing], likelihood[writing]
            ended = writing & np.isin(drawn, ends)
            until[ended], finished[ended] = at, True
        if not (at + 1 < until).any():
            break
        logits = step(ids[:, at])
    return [
        _generation(
            tokenizer, prompt, ids[row, first:last], log_probs[row, first:last], bool(finished[row])
        )
        for row, (prompt, first, last) in enumerate(zip(prompts, lengths, until, strict=True))
    ]


def draw(
    logits: Tensor, keys: np.ndarray, numbers: np.ndarray, sampling: Sampling, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token a row from logits (B, V); its id (B,) and the model's own log-probability of
    it (B,).
    """
    if not bool(torch.isfinite(logits).all()):
        raise XinslmError(
            f"teacher {name} gives numbers that are not finite while it writes. Try --dtype float32"
        )
    log_p = torch.log_softmax(logits.double().cpu(), dim=1)
    if sampling.temperature == 0:
        tokens = log_p.argmax(dim=1)
    else:
        probs = torch.softmax(log_p / sampling.temperature, dim=1)
        order = None
        if sampling.top_p < 1:
            probs, order = probs.sort(dim=1, descending=True, stable=True)
            # the one that reaches it included
            kept = probs.cumsum(dim=1) - probs < sampling.top_p * (1 - 1e-12)
            probs = probs * kept
        cumulative = probs.cumsum(dim=1)
        mass = cumulative[:, -1:].contiguous()
        points = torch.from_numpy(uniforms(keys, numbers, sampling.seed))[:, None] * mass
        place = torch.searchsorted(cumulative, points, right=True)
        # rounding must not pass the last mass
        place = torch.minimum(place, torch.searchsorted(cumulative, mass))
        tokens = (place if order is None else order.gather(1, place))[:, 0]
    return tokens.numpy(), log_p.gather(1, tokens[:, None])[:, 0].numpy()


def uniforms(keys: np.ndarray, numbers: np.ndarray, seed: int) -> np.ndarray:
    """One number in [0, 1) for each pair of key and number, (B,) float64, by splitmix64."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):
        x = mix(mix(np.full(len(keys), seed, np.uint64)) ^ keys.astype(np.int64).astype(np.uint64))
        x = mix(x ^ numbers.astype(np.int64).astype(np.uint64))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _generation(
    tokenizer: Any, prompt: Prompt, ids: np.ndarray, log_probs: np.ndarray, finished: bool
) -> Generation:
    decoder = StreamDecoder(tokenizer, at_start=not isinstance(prompt, str) or not prompt)
    text = decoder.add(*ids.tolist()) + decoder.finish()
    return Generation(
        text, [tokenizer.token_bytes(t) for t in ids.tolist()], log_probs.tolist(), [], finished
    )
