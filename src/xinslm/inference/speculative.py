"""Speculative decoding: guess tokens, check them in one pass, keep those that were right.

    engine = Speculative(NativeEngine.load("student-4bit"), LookupDrafter())

A pass over several tokens reads the weights once, so it takes less time than as many steps. The
engine's logits have the same bits either way, and a token is kept only if the caller takes it, so
the text is exactly that of the engine alone, also with sampling and a seed. (Leviathan et al.,
arXiv:2211.17192, accept with a probability instead, which keeps the distribution and not the text.)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xinslm.errors import UsageError
from xinslm.inference.native_engine import NativeEngine

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer

FEWEST, MOST = 2, 12
"""Tokens that are guessed at a time: more after guesses that were right, fewer after wrong ones."""


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Guess up to `count` tokens after `ids`; none if there is nothing to go by."""


class LookupDrafter:
    """Guesses what followed the last tokens where they stood before (prompt lookup decoding)."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._ids: list[int] = []
        self._last: list[dict[tuple[int, ...], int]] = [{} for _ in self._lengths]
        """For each length: where the token after an n-gram stands, at its latest occurrence."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Guess from the latest earlier place of the longest n-gram that the text ends with."""
        known = len(self._ids)
        if known > len(ids) or self._ids[-8:] != list(ids[max(known - 8, 0) : known]):
            self._ids, known = [], 0
            for table in self._last:
                table.clear()
        for end in range(known, len(ids)):  # the n-grams that end before place `end`
            for n, table in zip(self._lengths, self._last, strict=True):
                if end >= n:
                    table[tuple(ids[end - n : end])] = end
        self._ids += ids[known:]
        for n, table in zip(self._lengths, self._last, strict=True):
            if len(ids) > n and (place := table.get(tuple(ids[-n:]))) is not None:
                return list(ids[place : place + count])
        return []


class ModelDrafter:
    """Guesses with a smaller model, whose most likely tokens it takes."""

    def __init__(self, engine: NativeEngine) -> None:
        self.engine = engine

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Continue `ids` greedily, as far as the small model's context goes."""
        count = min(count, self.engine.context_length - len(ids))
        if count < 1:
            return []
        logits = self.engine.start(ids)
        guess: list[int] = []
        while len(guess) < count:
            guess.append(int(logits.argmax()))
            if len(guess) < count:
                logits = self.engine.step(guess[-1])
        return guess


class Speculative:
    """An `Engine` that checks a drafter's guesses with another engine."""

    def __init__(self, target: NativeEngine, drafter: Drafter) -> None:
        if isinstance(drafter, ModelDrafter):
            _require_same_tokens(target, drafter.engine)
        self.target, self.drafter = target, drafter
        self.name, self.tokenizer = target.name, target.tokenizer
        self.context_length = target.context_length
        self.guessed = self.accepted = 0
        """Tokens that were guessed, and that were right."""
        self._ids: list[int] = []
        self._expected: list[int] = []
        """Guesses that are computed and not yet asked for; `_rows` has the logits after each."""
        self._rows: list[np.ndarray] = []
        self._width = FEWEST * 2

    tokenizer: "Tokenizer"

    @property
    def position(self) -> int:
        """Number of tokens in the sequence."""
        return len(self._ids)

    @property
    def reused(self) -> int:
        """Number of tokens of the last `start` that were already computed."""
        return self.target.reused

    def start(self, ids: Sequence[int]) -> np.ndarray:
        """Make `ids` the sequence; return the logits of the next token."""
        self._forget()
        logits = self.target.start(ids)
        self._ids = list(ids)
        return logits

    def step(self, token: int) -> np.ndarray:
        """Append one token; return the next logits, which may be there already."""
        if self._expected and self._expected[0] == token:
            self._ids.append(self._expected.pop(0))
            self.accepted += 1
            return self._rows.pop(0)
        if self._expected:  # this guess was wrong, and with it all that follow
            self._width = max(FEWEST, self._width // 2)
        elif self.guessed:
            self._width = min(MOST, self._width + 2)
        self._forget()
        room = min(self._width, self.context_length - self.position - 1)
        draft = self.drafter.propose([*self._ids, token], room) if room > 0 else []
        rows = self.target.verify([token, *draft])
        self._ids.append(token)
        self.guessed += len(draft)
        self._expected, self._rows = draft, list(rows[1:])
        first: np.ndarray = rows[0]
        return first

    def reset(self) -> None:
        """Forget the sequence."""
        self._forget()
        self._ids = []
        self.target.reset()

    def _forget(self) -> None:
        """Take guesses back that were not asked for."""
        if self._expected:
            self.target.rewind(len(self._ids))
        self._expected, self._rows = [], []


def _require_same_tokens(target: NativeEngine, draft: NativeEngine) -> None:
    theirs, ours = draft.tokenizer, target.tokenizer
    if theirs.vocab_size > ours.vocab_size or theirs.fingerprint() != ours.fingerprint():
        raise UsageError(
            f"--draft {draft.name}: its tokenizer is not that of {target.name}, so its guesses "
            "would be other tokens; take a model with the same tokenizer, or --draft lookup"
        )
