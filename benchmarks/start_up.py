"""Time from the start of the process to the first token, and to the first forward pass of a task.

    python benchmarks/start_up.py SmolLM2.gguf --data bench --runs 11

`generate`: from the spawn to the first byte of the text, for a prompt of one word. `benchmark`: from
the spawn to the first call of the scorer, so that importing, reading the task's data, building the
prompts and loading the model are in it. CPU seconds are user and system time of the whole process,
all its threads together; they hardly depend on what else the machine does, the wall time does.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import describe

SCORER = """
import os, sys
from xinslm.cli.main import main
import xinslm.evaluate.likelihood as likelihood

def stop(*ignored):
    os.write(1, b"scorer called")
    os._exit(0)

likelihood.LikelihoodScorer.__call__ = stop
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command up to the first call of the scorer."""


def once(command: list[str]) -> tuple[float, float]:
    """Wall seconds from the spawn to the first byte on stdout, and CPU seconds of the process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    shown = os.read(process.stdout.fileno(), 1)
    wall = time.perf_counter() - began
    text = shown + process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not shown:
        raise SystemExit(f"{' '.join(command[-8:])} failed: {text.decode(errors='replace')[:300]}")
    return wall, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="data of the tasks; without it only generate")
    parser.add_argument("--tasks", nargs="+", default=["truthfulqa_mc1", "hellaswag"])
    parser.add_argument("--max-minutes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=11)
    options = parser.parse_args()
    print(describe(("numpy",)), f"load {os.getloadavg()[0]:.1f}", flush=True)
    command = ["generate", str(options.model), "--prompt", "Hello", "--max-new-tokens", "1"]
    rows = {
        "python -c pass": [sys.executable, "-c", "print()"],
        "import numpy": [sys.executable, "-c", "import numpy; print()"],
        "generate": [sys.executable, "-m", "xinslm", *command, "--temperature", "0"],
    }
    for task in options.tasks if options.data else ():
        words = ["benchmark", str(options.model), "--tasks", task, "--data", str(options.data)]
        rows[f"benchmark {task}"] = [
            *(sys.executable, "-c", SCORER, *words),
            *("--max-minutes", str(options.max_minutes)),
        ]
    print("| what | CPU s, median | least | wall s, median | least |\n|---|---|---|---|---|")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for number in range(options.runs + 1):
        for name, words in rows.items():
            found = once(words)
            if number > 0:  # the first round fills the disk cache
                times[name].append(found)
    for name, found in times.items():
        walls, used = zip(*found, strict=True)
        cells = (statistics.median(used), min(used), statistics.median(walls), min(walls))
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in cells)} |", flush=True)


if __name__ == "__main__":
    main()
