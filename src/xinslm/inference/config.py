"""Settings of `xinslm generate` and `xinslm chat`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import POSITIONAL
from xinslm.ranges import Activations, Device, Dtype, Range, Settings, range_errors
from xinslm.sampling import Sampling

EngineName = Literal["auto", "native", "pytorch"]
CacheType = Literal["float16", "int8"]

_ENGINE = {"max_seq_length": Range(1), "threads": Range(1, 1024)}
_WRITING = {"max_new_tokens": Range(1)}


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """A model, and the engine that runs it."""

    model: Annotated[Path, POSITIONAL]
    """A model, run or quantized folder, a GGUF file, or a Hub name."""
    max_seq_length: int | None = None
    """Longest text or conversation in tokens; by default the model's own context."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: Dtype = "auto"
    """Type to compute in; auto: bfloat16 where the processor multiplies it faster."""
    engine: EngineName = "auto"
    """What computes. native: C++, with 4-bit and 8-bit weights as they are; pytorch: any model, on
    any device, weights dequantized. auto takes native where it can run the model.
    """
    activations: Activations | None = None
    """Inputs of 4-bit and 8-bit weights: as they are, or rounded to int8 blocks as llama.cpp does.
    By default int8 in the native engine, float in PyTorch, where int8 is a slow reference.
    """
    kv_cache: CacheType = "float16"
    """Type of keys and values in the native engine; int8 takes half the memory."""
    draft: str = "auto"
    """Guess several tokens and check them at once (speculative decoding); the text is the same.
    lookup: what followed the last words where they stood before; none; or a smaller model with the
    same tokenizer. auto: lookup in the native engine, none in PyTorch, which takes no drafts.
    """
    threads: int | None = None
    """Threads to compute with; by default one for each processor that the process may use."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return [*super().errors(), *range_errors(self, _ENGINE)]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(EngineConfig, Sampling):
    """Continue a text with a model."""

    prompt: str = ""
    """Text to continue; without one the model starts a document."""
    prompt_file: Path | None = None
    """UTF-8 file that holds the prompt."""
    chat: bool = False
    """Put the prompt into the model's chat template, as the user's message."""
    max_new_tokens: int = 200
    """Most tokens to generate."""
    stop: tuple[str, ...] = ()
    """Texts that end generation; they are not part of the result."""
    run: Path | None = None
    """Run folder whose samples.json receives the text, for `xinslm report`."""
    name: str | None = None
    """Name of the sample in the report; by default the model folder's name."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = [*super().errors(), *range_errors(self, _WRITING)]
        if self.prompt and self.prompt_file is not None:
            wrong.append("give --prompt or --prompt-file, not both")
        return wrong


@dataclass(frozen=True, kw_only=True)
class ChatConfig(EngineConfig, Sampling):
    """Talk with a model in the terminal."""

    system: str | None = None
    """System message that opens the conversation."""
    max_new_tokens: int = 512
    """Most tokens of one answer."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return [*super().errors(), *range_errors(self, _WRITING)]


@dataclass(frozen=True, kw_only=True)
class NativeConfig(Settings):
    """Show what the native library is, and whether it runs a model."""

    model: Annotated[Path | None, POSITIONAL] = None
    """A model to try: a model, run or quantized folder, a GGUF file, or a Hub name."""
