"""Settings of `xinslm generate` and `xinslm chat`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from xinslm.ranges import SHARE, Device, Dtype, Range, Settings, range_errors

_SAMPLING = {
    "temperature": Range(0),
    "top_k": Range(0),
    "top_p": Range(0, 1, above=True),
    "min_p": SHARE,
    "seed": Range(0),
}
_WRITING = {"max_new_tokens": Range(1), "max_seq_length": Range(1)}


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
    seed: int | None = None
    """Same seed, same text; without one each call differs."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return range_errors(self, _SAMPLING)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """Continue a text with a model."""

    model: Annotated[Path, tyro.conf.Positional]
    """Model folder, run folder (its best checkpoint), 4-bit folder of `xinslm quantize`, or a Hub
    name.
    """
    prompt: str = ""
    """Text to continue; without one the model starts a document."""
    prompt_file: Path | None = None
    """UTF-8 file that holds the prompt, taken as it is."""
    chat: bool = False
    """Put the prompt into the model's chat template, as the user's message."""
    max_new_tokens: int = 200
    """Most tokens to write."""
    stop: tuple[str, ...] = ()
    """Texts that end the writing; they are not part of the result."""
    max_seq_length: int | None = None
    """Longest text in tokens, prompt included; by default the model's own context."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: Dtype = "float32"
    """Type to compute in."""
    run: Path | None = None
    """Run folder whose samples.json receives the text, for `xinslm report`."""
    name: str | None = None
    """What the sample is called in the report; by default the model folder's name."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = [*super().errors(), *range_errors(self, _WRITING)]
        if self.prompt and self.prompt_file is not None:
            wrong.append("give --prompt or --prompt-file, not both")
        return wrong


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Sampling):
    """Talk with a model in the terminal."""

    model: Annotated[Path, tyro.conf.Positional]
    """Model folder, run folder (its best checkpoint), 4-bit folder of `xinslm quantize`, or a Hub
    name.
    """
    system: str | None = None
    """System message that opens the conversation."""
    max_new_tokens: int = 512
    """Most tokens of one answer."""
    max_seq_length: int | None = None
    """Longest conversation in tokens; by default the model's own context."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: Dtype = "float32"
    """Type to compute in."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return [*super().errors(), *range_errors(self, _WRITING)]
