"""The interface between models and generation, chat and serving.

An engine holds one sequence. `start` sets it and `step` appends one token; both return the logits
of the next token as numpy, so that callers do not depend on PyTorch. If a `start` shares a prefix
with the last sequence, only the rest is computed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xinslm.errors import UsageError
from xinslm.tokenizer.base import check_vocabulary

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer


class Engine(Protocol):
    """One model with one sequence in its cache."""

    name: str
    """Folder or Hub name that the model came from."""
    tokenizer: "Tokenizer"
    context_length: int
    """Maximum number of tokens in the sequence."""

    @property
    def position(self) -> int:
        """Number of tokens in the sequence."""

    @property
    def reused(self) -> int:
        """Number of tokens of the last `start` that were already computed."""

    def start(self, ids: Sequence[int]) -> np.ndarray:
        """Make `ids` the sequence; return float32 logits (tokenizer.vocab_size,) of the next token.

        UsageError if `ids` is longer than the context; ValueError if it is empty.
        """

    def step(self, token: int) -> np.ndarray:
        """Append one token; return the next logits. UsageError if the context is full."""

    def reset(self) -> None:
        """Forget the sequence."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


class EngineBase:
    """What the engines of this package share: the ids of the sequence, and the limits."""

    def __init__(
        self, name: str, tokenizer: "Tokenizer", context_length: int | None, own: int, rows: int
    ) -> None:
        """`own` is the model's context, `rows` are those of its embedding."""
        if context_length is not None and not 1 <= context_length <= own:
            raise UsageError(
                f"--max-seq-length {context_length}: the context of {name} holds 1 to {own:,} "
                f"tokens"
            )
        check_vocabulary(rows, tokenizer, name)
        self.name, self.tokenizer = name, tokenizer
        self.context_length = context_length or own
        self.reused = 0
        """Number of tokens of the last `start` that were already computed."""
        self._ids: list[int] = []

    @property
    def position(self) -> int:
        """Number of tokens in the sequence."""
        return len(self._ids)

    def _shared(self, ids: Sequence[int]) -> int:
        """How many tokens of a new sequence are computed; the last one is computed again, for its
        logits.
        """
        if not ids:
            raise ValueError("a text needs at least one token to start from")
        self._require_room(len(ids))
        return min(common_prefix(self._ids, ids), len(ids) - 1)

    def _require_room(self, length: int) -> None:
        if length > self.context_length:
            raise UsageError(
                f"the text has {length:,} tokens, the context of {self.name} holds "
                f"{self.context_length:,}; "
                f"shorten the text"
            )
