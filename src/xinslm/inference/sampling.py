"""Choose the next token from logits: top-k, top-p, min-p, then temperature, in llama.cpp's order.

The filters look at the model's own distribution and the temperature only reshapes what they kept,
so a high temperature cannot add unlikely tokens. (transformers divides by the temperature first.)
Computed with numpy in float64, so that a seed gives the same text on every device with the same
logits.

A repetition penalty comes before the filters.

Nucleus: Holtzman et al., arXiv:1904.09751. Min-p: arXiv:2407.01082.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from xinslm.native import library
from xinslm.sampling import Sampling


class Sampler:
    """Draws tokens by `settings`; create one for each text, because it holds the random state."""

    def __init__(self, settings: Sampling) -> None:
        settings.check()
        self.settings = settings
        self._native = _native_draw()

    @cached_property
    def _random(self) -> "np.random.Generator":
        return np.random.default_rng(self.settings.seed)

    def distribution(
        self, logits: np.ndarray, seen: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that the filters keep, most likely first (ties by id), and their
        probabilities, after the tokens of `seen`.
        """
        s = self.settings
        if s.repetition_penalty != 1 and len(seen):
            logits, ids = logits.copy(), np.unique(np.asarray(seen, np.int64))
            values = logits[ids]
            logits[ids] = np.where(
                values > 0, values / s.repetition_penalty, values * s.repetition_penalty
            )
        if s.temperature == 0:
            return np.array([int(logits.argmax())]), np.ones(1)
        tokens = _most_likely(logits, s.top_k)
        kept = logits[tokens].astype(np.float64)
        probabilities = _softmax(kept)
        count = len(tokens)
        if s.top_p < 1:
            # the fewest tokens that reach top_p, including the one that reaches it
            count = int(np.searchsorted(probabilities.cumsum(), s.top_p * (1 - 1e-12))) + 1
        if s.min_p > 0:
            count = min(count, int((probabilities >= s.min_p * probabilities[0]).sum()))
        return tokens[:count], _softmax(kept[:count] / s.temperature)

    def draw(self, logits: np.ndarray, seen: Sequence[int] = ()) -> int:
        """Draw one token from (vocabulary,) logits, after the tokens of `seen`."""
        tokens, probabilities = self.distribution(logits, seen)
        place = np.searchsorted(probabilities.cumsum(), self._random.random(), side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])

    def draw_with_probability(
        self, logits: np.ndarray, seen: Sequence[int] = ()
    ) -> tuple[int, float]:
        """Draw one token, and return its `log_probability`; in the native library if it is there,
        which takes a tenth of the time.
        """
        if self._native is None:
            token = self.draw(logits, seen)
            return token, log_probability(logits, token)
        uniform = self._random.random() if self.settings.temperature else 0.0
        return self._native(logits, self.settings, seen, uniform)


def log_probability(logits: np.ndarray, token: int) -> float:
    """Natural logarithm of the model's own probability of `token`, before any filter or
    temperature.
    """
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(wide[token] - top - np.log(np.exp(wide - top).sum()))


def _native_draw() -> Callable[..., tuple[int, float]] | None:
    if library() is None:
        return None
    from xinslm.native.sampling import draw

    return draw


def _most_likely(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Sort ids by falling logit, ties by id; only the first `top_k` (0: all)."""
    if 0 < top_k < len(logits):
        threshold = np.partition(logits, -top_k)[-top_k]
        candidates = np.flatnonzero(logits >= threshold)
    else:
        candidates = np.arange(len(logits))
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order][: top_k or None]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
