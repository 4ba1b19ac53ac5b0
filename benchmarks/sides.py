"""Processes that are measured beside each other: run in turn, each prints one JSON line; medians
and ratios come out.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

FIGURES = "figures.json"


def xinslm(line: str, threads: int = 2) -> None:
    """Run one command of the tool; its output goes to the terminal only if it fails."""
    run_quietly([sys.executable, "-m", "xinslm", *shlex.split(line)], threads)


def finished(run: Path) -> bool:
    """Whether a training run took its last step."""
    state = run / "checkpoints" / "last" / "training_state.json"
    if not state.is_file():
        return False
    return (
        json.loads(state.read_text())["step"]
        == json.loads((run / "run.json").read_text())["total_steps"]
    )


def run_quietly(command: list[str], threads: int = 2) -> str:
    """Run a process; stop with what it wrote if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)[:2000]}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def figures_of(command: list[str], threads: int = 2) -> dict:
    """Run a side; its last line of output is JSON."""
    return json.loads(run_quietly(command, threads).strip().splitlines()[-1])


def in_turn(sides: dict[str, list[str]], rounds: int, threads: int = 2) -> dict[str, list[dict]]:
    """Results of every side, round by round, the order turned round each time."""
    results: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            results[name].append(figures_of(sides[name], threads))
    return results


def median(results: list[dict], key: str) -> float:
    """Median of one figure over the rounds."""
    return statistics.median(result[key] for result in results)


def ratios(ours: list[dict], theirs: list[dict], key: str) -> tuple[float, float, float]:
    """Median, least and largest of the rounds' ratios ours/theirs."""
    each = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(each), min(each), max(each)


def keep(work: Path, row: str, values: dict) -> None:
    """Store a row's figures in the work folder, where the table is made from."""
    path = work / FIGURES
    stored = json.loads(path.read_text()) if path.is_file() else {}
    stored[row] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1))
    print(f"{row}: {json.dumps(values)}", flush=True)
