"""Generation with a local teacher: batches with a key-value cache, without padding.

Prompts of different lengths share a batch from the length of the shortest: each further step feeds
a row the next token of its own prompt, or the token that was drawn. No row has pads, so any causal
model with a cache works. Random numbers are counter-based: seed, key and token index.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xinslm.draw import choose
from xinslm.errors import UsageError, XinslmError
from xinslm.sampling import Sampling
from xinslm.teachers.base import Generation, Prompt
from xinslm.tokenizer.base import StreamDecoder
from xinslm.tokenizer.chat import end_ids
from xinslm.tokenizer.start import text_ids

Step = Callable[[np.ndarray], Tensor]
"""Takes one token per row, (B,) int64; returns the next logits, (B, V) float32."""


class Writer(Protocol):
    """A causal model that keeps a key-value cache."""

    name: str
    tokenizer: Any
    max_length: int

    def begin(self, ids: np.ndarray, room: int) -> tuple[Tensor, Step]:
        """Read ids (B, T) that up to `room` tokens follow; the next logits (B, V), and the step."""
        ...


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a text after its start token, or of a chat up to the start of the answer."""
    if not isinstance(prompt, str):
        messages = [dict(message) for message in prompt]
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)[0]
        return ids
    ids = text_ids(tokenizer, prompt)
    if not ids:
        raise UsageError(
            "a prompt is empty, and the tokenizer has no BOS or EOS token to start from"
        )
    return ids


def write(
    teacher: Writer,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
) -> list[Generation]:
    """Answer prompts in one batch; an answer ends with an end token, at the limit, or when the
    context is full.
    """
    sampling.check()
    tokenizer, max_length, name = teacher.tokenizer, teacher.max_length, teacher.name
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    lengths = np.array([len(row) for row in rows])
    if lengths.max() >= max_length:
        raise UsageError(
            f"a prompt has {lengths.max():,} tokens, the context of teacher {name} is "
            f"{max_length:,} with the answer; "
            f"shorten it"
        )
    ends = np.array(sorted(end_ids(tokenizer)), np.int64)
    limits = np.minimum(lengths + max_new_tokens, max_length)
    shortest, total = int(lengths.min()), int(limits.max())
    ids = np.zeros((len(rows), total), np.int64)
    log_probs = np.zeros((len(rows), total))
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    until, finished = limits.copy(), np.zeros(len(rows), bool)
    logits, step = teacher.begin(ids[:, :shortest], total - shortest)
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
    """Draw one token per row from logits (B, V); return ids (B,) and the model's own
    log-probabilities (B,).
    """
    if not bool(torch.isfinite(logits).all()):
        raise XinslmError(
            f"teacher {name} gives numbers that are not finite while it writes. Try --dtype float32"
        )
    log_p = torch.log_softmax(logits.double().cpu(), dim=1)
    scaled, settings = log_p, sampling
    if sampling.temperature > 0:  # before the filters, as hosted models do
        scaled, settings = log_p / sampling.temperature, replace(sampling, temperature=1.0)
    tokens = choose(scaled, settings, uniforms(keys, numbers, sampling.required_seed()))
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
