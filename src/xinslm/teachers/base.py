"""Interfaces of teachers; an adapter is a class that implements one of them.

A teacher that gives full distributions returns `states` of sequences, then `logits` of a few rows
at a time, so that callers never hold (positions, vocabulary).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class DenseTeacher(Protocol):
    """Gives its full next-token distribution at any position of a given text."""

    name: str
    tokenizer: Any
    """Its `Tokenizer`."""
    vocab_size: int
    """Number of ids of the tokenizer; columns of `logits`."""
    max_length: int
    """Longest context in tokens."""
    device: torch.device

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines its results."""
        ...

    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Input of `logits` for each token of the sequences, concatenated: (total tokens, ...)."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """(rows, ...) from `states` -> (rows, vocab_size) float32."""
        ...


class HiddenTeacher(DenseTeacher, Protocol):
    """A dense teacher that also gives hidden states."""

    num_layers: int
    hidden_size: int

    def states_and_hidden(
        self, sequences: list[np.ndarray], depths: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`states`, and the outputs of blocks `depths` (from 1), each (total tokens, hidden)."""
        ...


Prompt = str | Sequence[Mapping[str, str]]
"""The beginning of a text, or the messages of a chat up to the last user message."""


@dataclass(frozen=True)
class Generation:
    """A teacher's answer; log-probabilities (nats) are the model's own, at temperature 1."""

    text: str
    token_bytes: list[bytes]
    """Bytes of each token, without the end token."""
    log_probs: list[float]
    """Log-probability of each token; [] if unknown."""
    top: list[list[tuple[bytes, float]]]
    """Most likely tokens at each position, most likely first; [] if unknown."""
    finished: bool
    """Whether the teacher ended the answer, instead of the length limit."""
