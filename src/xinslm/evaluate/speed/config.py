"""Settings of the speed measurement."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.gguf_file import is_gguf
from xinslm.hints import POSITIONAL
from xinslm.ranges import POSITIVE, Device, Dtype, Range, Settings, range_errors

EngineName = Literal["xinslm", "pytorch", "llama.cpp"]

_AT_LEAST_ONE = ("prompt_tokens", "decode_tokens", "repetitions", "threads")
_SPEED = dict.fromkeys(_AT_LEAST_ONE, Range(1)) | {"timeout_seconds": POSITIVE, "seed": Range(0)}


@dataclass(frozen=True)
class SpeedConfig(Settings):
    """Measure the speed, memory and size of models on this machine."""

    models: Annotated[tuple[Path, ...], POSITIONAL]
    """Models to compare: model, run or quantized folders, GGUF files, or Hub names."""
    engines: tuple[EngineName, ...] = ("xinslm", "llama.cpp")
    """What runs the models. xinslm takes its native engine where that runs the model, pytorch its
    other one; llama.cpp reads GGUF files only, on the CPU, and needs the package xllamacpp.
    """
    depths: tuple[int, ...] = (0, 512, 1536)
    """Tokens already in the context when speed is measured; those beyond a model's context are left
    out.
    """
    prompt_tokens: int = 128
    """Length of the prompt whose processing is timed."""
    decode_tokens: int = 32
    """Number of tokens whose generation is timed."""
    repetitions: int = 4
    """Processes started for each engine and model; an even number balances the order."""
    threads: int | None = None
    """Threads of every engine; by default the cores that this process may use."""
    device: Device = "cpu"
    """Where xinslm computes; auto takes cuda, then mps, then cpu."""
    dtype: Dtype = "auto"
    """Type that xinslm computes in; auto: bfloat16 where the processor multiplies it faster."""
    timeout_seconds: float = 3600.0
    """Longest time for one process; one that takes longer is ended."""
    seed: int = 0
    """Seed of the random tokens that prompts consist of."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _SPEED)
        if not self.models:
            wrong.append("models is empty; name at least one model")
        if not self.depths:
            wrong.append("depths is empty; 0 measures with an empty context")
        wrong += [f"depths has {d}, but must be at least 0" for d in self.depths if d < 0]
        if self.models and not self.pairs():
            named = ", ".join(self.engines) or "none"
            wrong.append(
                f"no engine can run a model: engines is {named}, and llama.cpp reads GGUF files "
                "only; add xinslm"
            )
        return wrong

    def pairs(self) -> list[tuple[EngineName, Path]]:
        """Each engine and model to measure, in the order of the results."""
        return [
            (engine, path)
            for path in dict.fromkeys(self.models)
            for engine in dict.fromkeys(self.engines)
            if engine != "llama.cpp" or is_gguf(path)
        ]
