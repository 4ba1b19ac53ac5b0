"""Measure speed, memory and size of models on this machine.

Each measurement is a process of its own (`worker.py`). The models take turns, and every second
round runs backwards, so that a drift of the machine's speed meets all of them alike.

    results = measure(SpeedConfig(models=(Path("runs/student"), Path("teacher.gguf"))))
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from xinslm.errors import XinslmError
from xinslm.evaluate.speed.config import EngineName, SpeedConfig
from xinslm.evaluate.speed.result import SpeedResult, combine
from xinslm.evaluate.speed.worker import Task
from xinslm.gguf_file import GgufFile
from xinslm.machine import usable_cores
from xinslm.progress import Listener, Progress, ignore

_MODULE = "xinslm.evaluate.speed.worker"


def measure(config: SpeedConfig, on_progress: Listener = ignore) -> list[SpeedResult]:
    """Measure every engine and model of `config.pairs()`; the results are in that order.

    A model that cannot be measured has `error` in its result. UsageError for wrong settings.
    """
    config.check()
    tasks = [_task(config, engine, path) for engine, path in config.pairs()]
    samples: list[list[dict[str, Any]]] = [[] for _ in tasks]
    errors: dict[int, str] = {}
    total, done = len(tasks) * config.repetitions, 0
    for repetition in range(config.repetitions):
        order = range(len(tasks))
        for index in order if repetition % 2 == 0 else reversed(order):
            task = tasks[index]
            if index not in errors:
                values = {"model": task.path, "engine": task.engine}
                on_progress(Progress("measure speed", done, total, "measurements", values))
                report = _run(task, config.timeout_seconds)
                if "error" in report:
                    errors[index] = report["error"]
                samples[index].append(report)
            done += 1
    on_progress(Progress("measure speed", done, total, "measurements"))
    return [
        SpeedResult(task.path, task.engine, config.repetitions, errors[index])
        if index in errors
        else combine(task.path, task.engine, samples[index])
        for index, task in enumerate(tasks)
    ]


def _task(config: SpeedConfig, engine: EngineName, path: Path) -> Task:
    return Task(
        path=str(path),
        engine=engine,
        depths=config.depths,
        prompt_tokens=config.prompt_tokens,
        decode_tokens=config.decode_tokens,
        threads=config.threads or usable_cores(),
        device=config.device,
        dtype=config.dtype,
        seed=config.seed,
        context_length=_context_length(path) if engine == "llama.cpp" else None,
    )


def _context_length(path: Path) -> int | None:
    """Context of a GGUF file's model, None if it cannot be read: llama.cpp reserves memory for all
    tokens before it is asked for any.
    """
    try:
        keys = GgufFile(path).keys
    except XinslmError:  # the worker says what is wrong, or llama.cpp can read it
        return None
    length = keys.get(f"{keys.get('general.architecture')}.context_length")
    return length if isinstance(length, int) else None


def _run(task: Task, timeout_seconds: float) -> dict[str, Any]:
    """Run one process; its report, or why there is none as `error`."""
    text = json.dumps(asdict(replace(task, started_at=time.time())))
    try:
        done = subprocess.run(
            [sys.executable, "-m", _MODULE, text],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {timeout_seconds:,g} seconds; the process was ended"}
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"error": _describe_exit(done.returncode, done.stderr.decode(errors="replace"))}
    return report


def _describe_exit(code: int, stderr: str) -> str:
    """Why a process left no report."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = f": {lines[-1][:300]}" if lines else ""
    if code >= 0:
        return f"the process ended with exit code {code}{last}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (the system ends processes so when memory runs out)" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{hint}{last}"
