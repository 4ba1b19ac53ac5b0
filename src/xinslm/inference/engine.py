"""What a program that runs a model offers to generation, chat and serving.

An engine holds one sequence. `start` gives it a text and `step` one token more; both return the
logits of the next token as numpy, so that nothing above depends on PyTorch. An engine remembers
what it has computed: a `start` with a text that begins like the last one computes the difference
only.
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
    """Most tokens the sequence may have."""

    @property
    def position(self) -> int:
        """Tokens that the sequence has."""

    @property
    def reused(self) -> int:
        """Tokens of the last `start` that were already computed."""

    def start(self, ids: Sequence[int]) -> np.ndarray:
        """Make `ids` the sequence; return float32 logits (tokenizer.vocab_size,) of the token after
        it.

        UsageError when there are more ids than context; ValueError when there are none.
        """

    def step(self, token: int) -> np.ndarray:
        """Append one token; return the logits of the token after it. UsageError when the context is
        full.
        """

    def reset(self) -> None:
        """Forget the sequence."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with in common."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
