"""Batched generation: one loop for students and local teachers, with a key-value cache.

A `Decoder` keeps the cache. `RowDecoder` (our transformer) gives a row that ended to a waiting
prompt; `HuggingFaceDecoder` reads prompts without pads and drops rows that ended. Filters look at
the model's own distribution and the temperature comes last, as in `inference.generate`. Token t of
a text is drawn with a number that follows from seed, key and t, so a text does not depend on its
batch. Rows that ended are dropped, or replaced, once they are an eighth of the batch.

    texts = generate_batch(open_decoder, prompts, keys, Sampling(seed=1), limits).texts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xinslm.draw import choose
from xinslm.errors import UsageError, XinslmError
from xinslm.sampling import Sampling
from xinslm.teachers.base import Generation, Prompt
from xinslm.tokenizer.base import StreamDecoder
from xinslm.tokenizer.start import text_ids
from xinslm.topk import blocked_topk

MOST_ROWS = 128
"""Number of parallel texts beyond which throughput does not grow."""
CACHE_BYTES = 2 << 30
"""Most bytes of keys and values, if the number of rows is not given."""
SPARE = 8
"""Rows that ended wait until they are one in this many."""


class Decoder(Protocol):
    """A causal model with a key-value cache of rows."""

    refills: bool
    """Whether a row can be read again while others are written."""
    token_forwards: int
    """Tokens that went through the model, with pads and rows that had ended."""

    def read(self, rows: Sequence[int], prompts: Sequence[np.ndarray]) -> tuple[Tensor, np.ndarray]:
        """Read the beginning of each prompt into a row; return the next logits (n, V) and how many
        tokens of each prompt were read.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, (B,); return the next logits (B, V)."""
        ...

    def keep(self, rows: np.ndarray) -> None:
        """Keep only these rows, in this order."""
        ...


OpenDecoder = Callable[[int, int], Decoder]
"""Takes the number of rows and the most tokens of a row."""


@dataclass(frozen=True)
class Limits:
    """Where texts end, and what is kept of them."""

    max_new_tokens: int
    context: int
    """Most tokens that the model reads; the last token of a text is written, but not read."""
    end_ids: frozenset[int]
    rows: int | None = None
    """Texts written in parallel; by default `MOST_ROWS`, or as many as `CACHE_BYTES` allow."""
    bytes_per_token: int = 1
    """Bytes of keys and values of a token."""
    top: int = 0
    """Number of most likely ids to keep for each token."""
    name: str = "the model"
    """How errors call the model."""
    is_over: Callable[[list[int]], bool] | None = None
    """Asked after each token whether a text (its new ids) ends there, such as at a stop string."""


@dataclass(frozen=True)
class Completion:
    """Continuation of one prompt."""

    tokens: np.ndarray
    """Ids, int64, (n,); includes the end token, if there is one."""
    log_probs: np.ndarray
    """The model's own log-probability of each token, before filters and temperature, (n,)."""
    ended: bool
    """Whether an end token came; otherwise `is_over`, the length limit or the context ended it."""
    top: np.ndarray
    """The model's most likely ids at each position, most likely first, int64, (n, k)."""


@dataclass(frozen=True)
class Completions:
    """Completions in the order of their prompts, and their cost."""

    texts: list[Completion]
    token_forwards: int


Tell = Callable[[int, int], None]
"""Receives the numbers of finished texts and of their tokens."""


@torch.inference_mode()
def generate_batch(
    open_decoder: OpenDecoder,
    prompts: Sequence[np.ndarray],
    keys: Sequence[int],
    sampling: Sampling,
    limits: Limits,
    tell: Tell = lambda texts, tokens: None,
) -> Completions:
    """Continue each prompt (ids, at least one) until an end token, a length limit or the context.

    Different `keys` give the same prompt different texts. Raises UsageError for a prompt that does
    not fit the context, XinslmError if the model's logits are not finite.
    """
    sampling.check()
    sampling.required_seed()
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > limits.context):
        wrong = lengths[(lengths < 1) | (lengths > limits.context)][0]
        raise UsageError(
            f"a prompt has {wrong:,} tokens, the context of {limits.name} is {limits.context:,}. "
            "Shorten it"
        )
    if not len(prompts):
        return Completions([], 0)
    most = np.minimum(limits.max_new_tokens, limits.context - lengths + 1)
    texts = [_Text(*entry) for entry in zip(prompts, keys, most.tolist(), strict=True)]
    # the longest first: the cache is allocated once, and neighbours need few pads
    waiting = [texts[number] for number in np.argsort(-lengths, kind="stable")]
    longest = int((lengths + most - 1).max())
    rows = min(limits.rows or rows_that_fit(limits.bytes_per_token, longest), len(prompts))
    decoder = open_decoder(rows, longest)
    writer = _Writer(decoder, sampling, limits, tell)
    while waiting:
        writer.write(waiting[:rows], waiting[rows:] if decoder.refills else [])
        waiting = [] if decoder.refills else waiting[rows:]
    return Completions([text.completion() for text in texts], decoder.token_forwards)


def rows_that_fit(bytes_per_token: int, tokens: int) -> int:
    """Number of texts of `tokens` tokens whose keys and values fit into `CACHE_BYTES`; 1 to
    `MOST_ROWS`.
    """
    return max(1, min(MOST_ROWS, CACHE_BYTES // (bytes_per_token * tokens)))


class _Text:
    """A prompt and what is written after it."""

    def __init__(self, prompt: np.ndarray, key: int, most: int) -> None:
        self.prompt, self.key, self.most = np.asarray(prompt, np.int64), key, most
        self.given: list[int] = []
        """Tokens of the prompt that the decoder has not read, the next one last."""
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.top: list[np.ndarray] = []
        self.ended = self.stopped = False

    @property
    def done(self) -> bool:
        return self.ended or self.stopped or len(self.tokens) == self.most

    def completion(self) -> Completion:
        top = np.stack(self.top) if self.top else np.zeros((len(self.tokens), 0), np.int64)
        tokens, log_probs = np.array(self.tokens, np.int64), np.array(self.log_probs)
        return Completion(tokens, log_probs, self.ended, top)


class _Writer:
    """Writes texts with a decoder."""

    def __init__(self, decoder: Decoder, sampling: Sampling, limits: Limits, tell: Tell) -> None:
        self.decoder, self.sampling, self.limits, self.tell = decoder, sampling, limits, tell
        self.finished = self.num_tokens = 0

    def write(self, rows: list[_Text], waiting: list[_Text]) -> None:
        """Write the texts in `rows`, and those that wait in the rows of finished ones."""
        tokens = self._read(range(len(rows)), rows)
        while True:
            gone = [row for row, text in enumerate(rows) if text.done]
            if len(gone) == len(rows) and not waiting:
                return
            if gone and len(gone) * SPARE >= len(rows):
                new, waiting = waiting[: len(gone)], waiting[len(gone) :]
                places = gone[: len(new)]
                for row, text in zip(places, new, strict=True):
                    rows[row] = text
                if new:
                    tokens[places] = self._read(places, new)
                else:
                    order = _without(np.isin(np.arange(len(rows)), gone))
                    self.decoder.keep(order)
                    rows, tokens = [rows[row] for row in order], tokens[order]
                continue
            tokens = self._append(self.decoder.step(torch.from_numpy(tokens)), rows)

    def _read(self, rows: Sequence[int], texts: list[_Text]) -> np.ndarray:
        logits, num_read = self.decoder.read(rows, [text.prompt for text in texts])
        for text, count in zip(texts, num_read, strict=True):
            text.given = text.prompt[count:][::-1].tolist()
        return self._append(logits, texts)

    def _append(self, logits: Tensor, texts: list[_Text]) -> np.ndarray:
        """Draw a token for each text that is past its prompt; return each row's next token."""
        keys = np.array([text.key for text in texts])
        numbers = np.array([len(text.tokens) for text in texts])
        quantiles = uniforms(keys, numbers, self.sampling.required_seed())
        seen = _seen(texts) if self.sampling.repetition_penalty != 1 else None
        drawn, log_probs = choose(logits, self.sampling, quantiles, seen)
        if not np.isfinite(log_probs).all():
            raise XinslmError(
                f"{self.limits.name} gives numbers that are not finite while it writes: try "
                "float32, or look at its weights"
            )
        top = blocked_topk(logits, self.limits.top)[1].cpu().numpy() if self.limits.top else None
        for row, text in enumerate(texts):
            if text.given:
                drawn[row] = text.given.pop()
            elif not text.done:
                text.tokens.append(int(drawn[row]))
                text.log_probs.append(float(log_probs[row]))
                text.ended = text.tokens[-1] in self.limits.end_ids
                if self.limits.is_over is not None:
                    text.stopped = self.limits.is_over(text.tokens)
                if top is not None:
                    text.top.append(top[row])
                if text.done:
                    self.finished, self.num_tokens = (
                        self.finished + 1,
                        self.num_tokens + len(text.tokens),
                    )
                    self.tell(self.finished, self.num_tokens)
        return drawn


def _seen(texts: list[_Text]) -> np.ndarray:
    """Ids of each prompt and its text so far, (B, longest) int64; shorter rows repeat their first
    id.
    """
    counts = [len(text.prompt) + len(text.tokens) for text in texts]
    seen = np.empty((len(texts), max(counts)), np.int64)
    for row, text, count in zip(seen, texts, counts, strict=True):
        row[: len(text.prompt)] = text.prompt
        row[len(text.prompt) : count] = text.tokens
        row[count:] = row[0]
    return seen


def _without(gone: np.ndarray) -> np.ndarray:
    """Rows that stay, as they move: the last ones go to the places of those that are `gone`."""
    left = int((~gone).sum())
    order = np.arange(left)
    order[gone[:left]] = left + np.flatnonzero(~gone[left:])
    return order


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


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a text after the document start, or of a chat up to the start of the answer."""
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


def to_generation(tokenizer: Any, prompt: Prompt, text: Completion) -> Generation:
    """Decode a completion; the end token is left out."""
    count = len(text.tokens) - text.ended
    ids, log_probs = text.tokens[:count].tolist(), text.log_probs[:count].tolist()
    decoder = StreamDecoder(tokenizer, at_start=not isinstance(prompt, str) or not prompt)
    words = decoder.add(*ids) + decoder.finish()
    return Generation(words, [tokenizer.token_bytes(t) for t in ids], log_probs, [], text.ended)
