"""What is timed, and in which order; the same for every engine.

A depth is the number of tokens that the context already holds. At each depth a prompt is read and
tokens are generated, as in llama-bench. Prompts are random tokens, and each prompt differs from the
text before it in its first new token, so an engine reuses exactly the tokens of the depth and
computes the rest.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from xinslm.errors import XinslmError

if TYPE_CHECKING:  # numpy would add to the memory of a process that runs llama.cpp
    from xinslm.inference.engine import Engine

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens that are timed."""

    depths: tuple[int, ...]
    prompt_tokens: int
    decode_tokens: int

    @property
    def longest(self) -> int:
        """Tokens that the context must hold: one more than the deepest measurement reads."""
        return max((0, *self.depths)) + max(self.prompt_tokens, self.decode_tokens + 1) + 1


@dataclass(frozen=True)
class Speed:
    """Speed of one repetition at one depth, tokens per second; None if it cannot be measured."""

    depth: int
    prefill: float | None
    decode: float


@dataclass(frozen=True)
class Timings:
    """What one repetition measured."""

    first_token_seconds: float
    speeds: tuple[Speed, ...]


class TimedModel(Protocol):
    """A loaded model that keeps the tokens of the last call in its cache."""

    context_length: int
    vocab_size: int

    def first_token(self, ids: Sequence[int]) -> float:
        """Seconds from the call to the next token of `ids`, with nothing cached."""

    def prefill(self, ids: Sequence[int], depth: int) -> float | None:
        """Seconds to read ids[depth:] after ids[:depth], which are cached; None if they were read
        again.
        """

    def decode(self, ids: Sequence[int], count: int) -> float:
        """Seconds to generate `count` tokens after the first one that follows `ids`."""


class EngineTimer:
    """A `TimedModel` on an `Engine`; tokens are chosen greedily."""

    def __init__(self, engine: "Engine", clock: Callable[[], float] = time.perf_counter) -> None:
        self._engine, self._clock = engine, clock
        self.context_length = engine.context_length
        self.vocab_size = engine.tokenizer.vocab_size

    def first_token(self, ids: Sequence[int]) -> float:
        """Time a whole prompt and the choice of a token."""
        self._engine.reset()
        start = self._clock()
        int(self._engine.start(ids).argmax())
        return self._clock() - start

    def prefill(self, ids: Sequence[int], depth: int) -> float | None:
        """Time the tokens after `depth`."""
        start = self._clock()
        self._engine.start(ids)
        seconds = self._clock() - start
        return seconds if self._engine.reused == depth else None

    def decode(self, ids: Sequence[int], count: int) -> float:
        """Time `count` steps."""
        token = int(self._engine.start(ids).argmax())
        start = self._clock()
        for _ in range(count):
            token = int(self._engine.step(token).argmax())
        return self._clock() - start


def fit(sizes: Sizes, context_length: int) -> tuple[Sizes, list[str]]:
    """Sizes that fit into a context, and a note for each change; XinslmError if none do."""
    if context_length < 3:
        raise XinslmError(f"a context of {context_length} tokens is too short to measure speed")
    prompt = min(sizes.prompt_tokens, context_length - 1)
    decode = min(sizes.decode_tokens, context_length - 2)
    shorter = replace(sizes, prompt_tokens=prompt, decode_tokens=decode)
    kept, notes = [], []
    if shorter != sizes:
        notes.append(
            f"the context holds {context_length:,} tokens: "
            f"{prompt:,} are read and {decode:,} generated"
        )
    for depth in sorted(set(sizes.depths)):
        needed = replace(shorter, depths=(depth,)).longest
        if needed <= context_length:
            kept.append(depth)
        else:
            notes.append(
                f"depth {depth:,} is left out: it takes a context of {needed:,} tokens, the model "
                f"has {context_length:,}"
            )
    return replace(shorter, depths=tuple(kept)), notes


def time_model(model: TimedModel, sizes: Sizes, seed: int = 0) -> Timings:
    """Warm up, then measure the time to the first token and the speed at each depth.

    The deepest text is read first, so that caches have their final size and shallower depths are
    beginnings of what is cached.
    """
    draw = random.Random(seed)
    text = [draw.randrange(model.vocab_size) for _ in range(sizes.longest - 1)]
    prompt = [draw.randrange(model.vocab_size) for _ in range(sizes.prompt_tokens)]
    model.prefill(prompt, 0)
    model.decode(prompt[:1], min(_WARM_UP_STEPS, sizes.decode_tokens))
    first_token = model.first_token(prompt)
    if sizes.depths:
        model.prefill(text, 0)
    speeds = []
    for depth in sorted(sizes.depths, reverse=True):
        new = [(text[depth] + 1) % model.vocab_size, *prompt[1:]]
        seconds = model.prefill([*text[:depth], *new], depth)
        prefill = None if seconds is None else _rate(sizes.prompt_tokens, seconds)
        took = model.decode(text[: max(depth, 1)], sizes.decode_tokens)
        speeds.append(Speed(depth, prefill, _rate(sizes.decode_tokens, took)))
    return Timings(first_token, tuple(reversed(speeds)))


def _rate(tokens: int, seconds: float) -> float:
    if seconds <= 0:
        raise XinslmError(f"{tokens} tokens took no measurable time; measure more tokens")
    return tokens / seconds
