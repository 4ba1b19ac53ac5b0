"""Generate text token by token; and the stage `xinslm generate`.

engine = TorchEngine.load("runs/student")
for piece in generate(engine, prompt_ids, Sampling(seed=1)):
    print(piece.text, end="", flush=True)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xinslm.errors import UsageError, XinslmError
from xinslm.inference.config import GenerateConfig
from xinslm.inference.engine import Engine
from xinslm.sampling import Sampling
from xinslm.tokenizer.start import text_ids

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer

Stop = Literal["end token", "stop text", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """One generated token."""

    text: str
    """Text that the token completed; empty for half a character, or if it may begin a stop text."""
    token: int
    log_probability: float
    """Log-probability under the model itself, before filters and temperature; nats."""
    stop: Stop | None = None
    """Why generation ended with this piece; None if it did not."""


def generate(
    engine: Engine,
    prompt_ids: Sequence[int],
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] | None = None,
    stop_strings: Sequence[str] = (),
    at_start: bool = True,
) -> Iterator[Piece]:
    """Continue `prompt_ids`; the last piece says why generation ended.

    Generation ends at a token of `stop_ids` (by default `end_ids`), whose piece has no text, before
    a text of `stop_strings`, after `max_tokens` tokens, or when the context is full. Set `at_start`
    if no text precedes the continuation, so that a sentencepiece tokenizer's first space is
    dropped. UsageError for a prompt beyond the context.
    """
    from xinslm.inference.sampling import Sampler
    from xinslm.tokenizer.base import StreamDecoder

    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_tokens}, but must be at least 1")
    sampler = Sampler(sampling or Sampling())
    ends = _Ends(engine.tokenizer) if stop_ids is None else stop_ids
    decoder = StreamDecoder(engine.tokenizer, at_start=at_start)
    watch = _StopWatch(stop_strings)
    logits = engine.start(prompt_ids)
    count, seen = 0, list(prompt_ids)
    while True:
        token, likelihood = sampler.draw_with_probability(logits, seen)
        seen.append(token)
        count += 1
        if token in ends:
            yield Piece(watch.add(decoder.finish()) + watch.rest(), token, likelihood, "end token")
            return
        text = watch.add(decoder.add(token))
        stop: Stop | None = None
        if watch.found:
            stop = "stop text"
        elif count == max_tokens:
            stop = "length"
        elif engine.position == engine.context_length:
            stop = "context"
        if stop and not watch.found:
            text += watch.add(decoder.finish()) + watch.rest()
        yield Piece(text, token, likelihood, stop)
        if stop:
            return
        logits = engine.step(token)


class _Ends:
    """`end_ids` of a tokenizer. The chat template, which is slow to compile, is asked only about a
    control token that is neither BOS nor EOS.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._certain = {tokenizer.eos_id, tokenizer.bos_id}
        self._possible = frozenset(tokenizer.special_tokens.values())

    def __contains__(self, token: int) -> bool:
        return token in self._certain or (token in self._possible and token in self._ids)

    @cached_property
    def _ids(self) -> frozenset[int]:
        from xinslm.tokenizer.chat import end_ids

        return end_ids(self._tokenizer)


class _StopWatch:
    """Passes text on, but holds back what may begin a stop text, and ends before a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            text, self._held = self._held[: min(places)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """Return the text that was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


@dataclass
class Clock:
    """Times a generation: the time to the first token counts as the prompt's."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    """Time for the tokens after the first."""

    def watch(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Pass pieces on, counting and timing them; the consumer's time is not counted."""
        while True:
            start = time.perf_counter()
            piece = next(pieces, None)
            took = time.perf_counter() - start
            if piece is None:
                return
            if self.new_tokens == 0:
                self.prompt_seconds = took
            else:
                self.seconds += took
            self.new_tokens += 1
            yield piece

    @property
    def tokens_per_second(self) -> float:
        """Generation speed, without the first token."""
        return (self.new_tokens - 1) / self.seconds if self.seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt processing speed."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    def describe(self) -> str:
        """One line, such as '123 tokens, 45.1 tok/s, prompt 812 tok/s'."""
        speed = f"{self.tokens_per_second:,.1f} tok/s, " if self.seconds else ""
        return (
            f"{self.new_tokens:,} tokens, {speed}prompt {self.prompt_tokens_per_second:,.0f} tok/s"
        )


@dataclass(frozen=True)
class Result:
    """Generated text and its speed."""

    prompt: str
    text: str
    """The continuation without the prompt."""
    stop: Stop
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    summary: str
    note: str = ""
    """Why the fast engine did not run it, if it could not."""

    def describe(self) -> str:
        """A line for the terminal, and the note; the text was streamed already."""
        reasons = {
            "end token": "the model ended the text",
            "stop text": "a stop text was reached",
            "length": "--max-new-tokens was reached",
            "context": "the model's context is full",
        }
        return f"{self.summary} ({reasons[self.stop]})" + f"\nnote: {self.note}" * bool(self.note)


def run(config: GenerateConfig, on_text: Callable[[str], None] = lambda text: None) -> Result:
    """Continue a prompt; `on_text` receives the continuation piece by piece."""
    from xinslm.inference.load import load_engine, missing_library
    from xinslm.runs import add_row, require_run

    config.check()
    prompt = _read_prompt(config)
    if config.run is not None:
        require_run(config.run)
    engine = load_engine(config)
    ids = prompt_ids(engine.tokenizer, prompt, config.chat)
    clock = Clock(len(ids))
    pieces = generate(
        engine, ids, config, config.max_new_tokens, None, config.stop, config.chat or not prompt
    )
    texts = []
    for piece in clock.watch(pieces):
        texts.append(piece.text)
        on_text(piece.text)
    assert piece.stop is not None
    text = "".join(texts)
    if config.run is not None:
        settings = {
            f.name: getattr(config, f.name)
            for f in fields(Sampling)
            if getattr(config, f.name) is not None
        }
        row = {
            "name": config.name or config.model.name,
            "model": str(config.model),
            "prompt": prompt,
            "text": text,
        }
        add_row(config.run, "samples.json", {**row, "settings": settings})
    speeds = clock.tokens_per_second, clock.prompt_tokens_per_second
    counts = len(ids), clock.new_tokens
    note = missing_library(config)
    return Result(prompt, text, piece.stop, *counts, *speeds, clock.describe(), note)


def prompt_ids(tokenizer: "Tokenizer", prompt: str, chat: bool) -> list[int]:
    """Encode a prompt after the tokenizer's start tokens, or as a user message of a chat."""
    if chat:
        require_chat_template(tokenizer, "Leave out --chat")
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )[0]
    ids = text_ids(tokenizer, prompt)
    if not ids:
        raise UsageError(
            "the prompt is empty, and the tokenizer has no BOS or EOS token to start "
            "from; give --prompt"
        )
    return ids


def require_chat_template(tokenizer: "Tokenizer", remedy: str) -> None:
    """Raise UsageError if the tokenizer has no chat template; `remedy` is an alternative for the
    user.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            f"the model's tokenizer has no chat template: it was not trained to talk. {remedy} to "
            "continue a text, or put a chat_template.jinja into the model's folder"
        )


def _read_prompt(config: GenerateConfig) -> str:
    if config.prompt_file is None:
        return config.prompt
    path: Path = config.prompt_file
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"--prompt-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise XinslmError(f"--prompt-file {path}: byte {error.start:,} is not UTF-8 text") from None
