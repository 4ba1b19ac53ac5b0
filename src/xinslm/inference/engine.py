"""The interface between models and generation, chat and serving.

An engine holds one sequence. `start` sets it and `step` appends one token; both return the logits
of the next token as numpy, so that callers do not depend on PyTorch. If a `start` shares a prefix
with the last sequence, only the rest is computed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

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
