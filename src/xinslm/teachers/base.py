"""What teachers can do, by kind; an adapter is a class that has one of these.

A teacher that gives whole distributions is asked for `states` of sequences, then for `logits` of a few of their rows at
a time, so that a caller never holds (positions, vocabulary).
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class DenseTeacher(Protocol):
    """Gives its whole next-token distribution for any position of a given text."""

    name: str
    tokenizer: Any
    """Its `Tokenizer`."""
    vocab_size: int
    """Ids of the tokenizer; columns of `logits`."""
    max_length: int
    """Longest context in tokens."""
    device: torch.device
    folder: Path

    @property
    def fingerprint(self) -> str:
        """Hash of what determines its answers."""
        ...

    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """What `logits` needs for each token of the sequences: (total tokens, ...), one behind the other."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """(rows, ...) from `states` -> (rows, vocab_size) float32."""
        ...
