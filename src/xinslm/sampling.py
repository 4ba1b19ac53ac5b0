"""How the next token is chosen: the settings that the student, teachers and endpoints share.

The filters look at the model's own distribution and the temperature comes last, as in llama.cpp.
An endpoint applies them in its server's order; vLLM and transformers apply the temperature first.
"""

from dataclasses import dataclass

from xinslm.errors import UsageError
from xinslm.ranges import SHARE, Range, Settings, range_errors

_SAMPLING = {
    "temperature": Range(0, 1_000_000),
    "top_k": Range(0),
    "top_p": Range(0, 1, above=True),
    "min_p": SHARE,
    "repetition_penalty": Range(0.01, 100),  # beyond, penalised logits leave float32
    "seed": Range(0),
}


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How the next token is chosen; the defaults are llama.cpp's, so exported models behave
    alike.
    """

    temperature: float = 0.8
    """Below 1 sharpens, above 1 flattens the distribution; 0 always takes the most likely token."""
    top_k: int = 40
    """Keep this many of the most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the fewest most likely tokens whose probabilities sum to this; 1 keeps all."""
    min_p: float = 0.05
    """Keep tokens at least this likely relative to the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the prompt or the text has already become less likely (CTRL,
    arXiv:1909.05858, section 4.1), as in transformers; 1.1 helps small models that repeat
    themselves.
    """
    seed: int | None = None
    """Same seed, same text; without one each call differs."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return range_errors(self, _SAMPLING)

    def required_seed(self) -> int:
        """The seed, 0 if the temperature is 0; UsageError if one is needed and not given."""
        if self.seed is None and self.temperature:
            raise UsageError("batched generation needs a seed")
        return self.seed or 0


UNFILTERED = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
"""Draws from the model's own distribution."""
