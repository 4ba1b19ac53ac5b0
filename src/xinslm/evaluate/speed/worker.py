"""The process that measures one model once: `python -m xinslm.evaluate.speed.worker JSON`.

JSON holds the fields of a `Task`. One line of JSON on standard output has the measurements, or
`error`. A process of its own makes peak memory and load time those of one model in one engine, and
a crash of the engine ends only this process.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xinslm.errors import XinslmError
from xinslm.evaluate.speed.meters import EnergyMeter, peak_memory_bytes
from xinslm.evaluate.speed.timing import EngineTimer, Sizes, TimedModel, fit, time_model
from xinslm.machine import OtherLoad
from xinslm.ranges import Device, Dtype


@dataclass(frozen=True)
class Task:
    """One measurement."""

    path: str
    engine: str
    depths: tuple[int, ...]
    prompt_tokens: int
    decode_tokens: int
    threads: int
    device: Device = "cpu"
    dtype: Dtype = "auto"
    seed: int = 0
    context_length: int | None = None
    """The model's context, if it is known before the model is loaded."""
    started_at: float = 0.0
    """Seconds since the epoch when the process was started."""

    @property
    def sizes(self) -> Sizes:
        """What to time."""
        return Sizes(tuple(self.depths), self.prompt_tokens, self.decode_tokens)


@dataclass(frozen=True)
class Loaded:
    """A loaded model, and the facts of a report that only its engine knows."""

    model: TimedModel
    facts: dict[str, Any]
    file_bytes: Callable[[], int]
    """Size of the weight files; asked after the measurement, because it opens them again."""


def measure(task: Task) -> dict[str, Any]:
    """Load the model and measure it; the report of one repetition."""
    load = OtherLoad()
    loaded, base_memory = _LOADERS[task.engine](task)
    ready = time.time()
    energy = EnergyMeter()
    sizes, notes = fit(task.sizes, loaded.model.context_length)
    timings = time_model(loaded.model, sizes, task.seed)
    if any(speed.prefill is None for speed in timings.speeds):
        notes.append("some prefill is left out: the engine reads the tokens before it again")
    joules, other_load, peak = energy.joules(), load.share(), peak_memory_bytes()
    return {
        **asdict(timings),
        "prompt_tokens": sizes.prompt_tokens,
        "decode_tokens": sizes.decode_tokens,
        "load_seconds": ready - task.started_at,
        "peak_memory_bytes": peak,
        "base_memory_bytes": base_memory,
        "energy_joules": joules,
        "other_load": other_load,
        "file_bytes": loaded.file_bytes(),
        "notes": notes,
        **loaded.facts,
    }


def _load_xinslm(task: Task) -> tuple[Loaded, int | None]:
    """The engine that `xinslm generate` takes."""
    from xinslm.inference.load import native_problem

    if native_problem(task.path, task.device, task.dtype):
        return _load_pytorch(task)
    from xinslm.inference.native_engine import NativeEngine

    base_memory = peak_memory_bytes()
    engine = NativeEngine.load(task.path, threads=task.threads)
    facts = {
        "threads": task.threads,
        "device": "cpu",
        "dtype": "weights as stored, keys and values float16",
        "version": f"native, {engine.context.kernels} kernels",
    }
    return Loaded(EngineTimer(engine), facts, lambda: _file_bytes(task.path)), base_memory


def _file_bytes(path: str) -> int:
    from xinslm.model.files import open_model

    return open_model(path).weight_bytes


def _load_pytorch(task: Task) -> tuple[Loaded, int | None]:
    import torch

    from xinslm.inference.torch_engine import TorchEngine

    torch.set_num_threads(task.threads)
    base_memory = peak_memory_bytes()
    engine = TorchEngine.load(task.path, task.device, task.dtype)
    dtype = str(next(engine.model.parameters()).dtype).removeprefix("torch.")
    facts = {
        "threads": torch.get_num_threads(),
        "device": engine.device.type,
        "dtype": dtype,
        "version": f"torch {torch.__version__}",
    }
    return Loaded(EngineTimer(engine), facts, lambda: _file_bytes(task.path)), base_memory


def _load_llama_cpp(task: Task) -> tuple[Loaded, int | None]:
    from xinslm.evaluate.speed.llama_cpp import LlamaCpp, version

    facts = {
        "threads": task.threads,
        "device": "cpu",
        "dtype": "weights as stored, keys and values float16",
        "version": version(),
    }
    base_memory = peak_memory_bytes()
    sizes = task.sizes
    if task.context_length is not None:
        sizes, _ = fit(sizes, task.context_length)
    path = Path(task.path)
    model = LlamaCpp(path, task.threads, sizes.longest)
    return Loaded(model, facts, lambda: path.stat().st_size), base_memory


_LOADERS = {"xinslm": _load_xinslm, "pytorch": _load_pytorch, "llama.cpp": _load_llama_cpp}


def _report(task: Task) -> dict[str, Any]:
    """Measure; whatever goes wrong becomes the report's `error`."""
    try:
        return measure(task)
    except XinslmError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # engines raise what they like; the row says it
        text = f"{type(error).__name__}: {error}"
        # PyTorch raises a RuntimeError
        if any(sign in text.lower() for sign in ("allocate memory", "out of memory")):
            text = f"out of memory ({text})"
        return {"error": text}


def main() -> None:
    """Run the task in the first argument."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the report
    task = Task(**json.loads(sys.argv[1]))
    task = replace(task, started_at=task.started_at or time.time())
    out.write(json.dumps(_report(task)) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
