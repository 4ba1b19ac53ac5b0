"""What teachers can do, by kind; an adapter is a class that has one of these.

A teacher that gives whole distributions is asked for `states` of sequences, then for `logits` of a
few of their rows at a time, so that a caller never holds (positions, vocabulary).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        """What `logits` needs for each token of the sequences: (total tokens, ...), one behind the
        other.
        """
        ...

    def logits(self, states: Tensor) -> Tensor:
        """(rows, ...) from `states` -> (rows, vocab_size) float32."""
        ...


class HiddenTeacher(DenseTeacher, Protocol):
    """A dense teacher whose hidden states can be had, too."""

    num_layers: int
    hidden_size: int

    def states_and_hidden(
        self, sequences: list[np.ndarray], depths: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """What `states` gives, and what comes out of blocks `depths` (from 1), (total tokens,
        hidden_size) each.
        """
        ...


Prompt = str | Sequence[Mapping[str, str]]
"""What a teacher is to answer: the beginning of a text, or the messages of a chat up to the user's
last.
"""


@dataclass(frozen=True)
class Sampling:
    """How a teacher draws its tokens: temperature first, then the nucleus, as hosted models do."""

    temperature: float = 1.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities sum to this."""
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """A teacher's answer; log-probabilities are the model's own, whatever the temperature, in
    nats.
    """

    text: str
    token_bytes: list[bytes]
    """Of each token, the one that ended the answer left out."""
    log_probs: list[float]
    """Of each token; [] where unknown."""
    top: list[list[tuple[bytes, float]]]
    """For each token, the most likely ones at its place, most likely first; [] where unknown."""
    finished: bool
    """Whether the teacher itself ended the answer, rather than the limit on its length."""


class GeneratingTeacher(Protocol):
    """Writes answers."""

    name: str

    def generate(
        self, prompts: Sequence[Prompt], keys: Sequence[int], sampling: Sampling
    ) -> list[Generation]:
        """Answer each prompt; `keys` tell draws apart, so that the same prompt may be answered
        twice.

        Where the teacher runs here, the answers follow from prompts, keys and settings alone.
        UsageError for a prompt that does not fit the context.
        """
        ...
