r"""The native engine beside llama.cpp, ik_llama.cpp, OpenVINO GenAI and mistral.rs on one GGUF file.

    python benchmarks/native_engine.py student.gguf \
        --peer llama.cpp=LLAMA_VENV/bin/python --peer ik=IK_VENV/bin/python \
        --peer openvino=OV_VENV/bin/python --peer mistralrs=MISTRAL_VENV/bin/python

Each engine is a process of its own with the model loaded; rounds go through the engines in turn,
every second one backwards, and only one works at a time. Outputs are compared first: log-probabilities
after a prompt, and greedy tokens. A row's ratio is the median over the rounds of the best peer's time
to ours; a row whose ratios spread by more than 25 % of their median (the middle half) has no verdict.
Peers have environments of their own: llama-cpp-python built from source with GGML_NATIVE, and so on.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from machine import describe

from xinslm.tokenizer.load import load_tokenizer

WORKER = Path(__file__).parent / "peers" / "engine_worker.py"
KIND = {"ik": "llama.cpp"}
"""Engines that another one's bindings drive."""
ROWS = {
    "prompt 512": ("prefill", 512, {}, 512),
    "decode, empty context": ("decode", 16, {"count": 48}, 48),
    "decode at 512": ("decode", 512, {"count": 48}, 48),
    "decode at 1,536": ("decode", 1536, {"count": 48}, 48),
    "verify 8 at 512": ("verify", 520, {"count": 8}, 8),
    "8 sequences at 128": ("batch", 128, {"rows": 8, "count": 24}, 192),
}
"""Command, prompt tokens, arguments, tokens that are counted."""


class Side:
    """An engine's process."""

    def __init__(self, name: str, command: list[str], file: Path, threads: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        kind = KIND.get(name, name.split(" ")[0])
        self.process = subprocess.Popen(
            [*command, str(WORKER), kind, str(file), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self.name = name
        self.load_seconds = self._answer()["ready"]

    def ask(self, **command: object) -> object:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            try:
                return json.loads(line)
            except ValueError:  # something that the engine prints
                continue
        raise SystemExit(f"{self.name} ended")


def compare(sides: list[Side], ids_of_text: list[int]) -> None:
    """Print how far the peers' log-probabilities and greedy tokens are from ours."""
    ours = sides[0]
    for length in (8, 100):
        ids = ids_of_text[:length]
        mine = ours.ask(do="logits", ids=ids)
        for side in sides[1:]:
            theirs = side.ask(do="logits", ids=ids)
            if theirs is not None:
                most = sorted(range(len(mine)), key=lambda t: -mine[t])[:20]
                away = max(abs(mine[t] - theirs[t]) for t in most)
                print(
                    f"log-probabilities after {length} tokens, top 20: {side.name} {away:.3f} away"
                )
    ids = ids_of_text[:60]
    mine = ours.ask(do="greedy", ids=ids, count=16)
    for side in sides[1:]:
        theirs = side.ask(do="greedy", ids=ids, count=16)
        if theirs is not None:
            same = next((i for i in range(16) if mine[i] != theirs[i]), 16)
            print(f"greedy tokens: {side.name} has the first {same} of 16")


def print_loads(commands: dict[str, list[str]], options: argparse.Namespace) -> None:
    """Print the median seconds until each engine can compute, and those of our packed file."""
    starts = {name: (command, options.file) for name, command in commands.items()}
    if options.packed:
        starts["xinslm, packed file"] = (commands["xinslm"], options.packed)
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(options.loads):
        for name, (command, file) in starts.items():
            side = Side(name.partition(",")[0], command, file, options.threads)
            seconds[name].append(side.load_seconds)
            size = side.ask(do="memory")
            side.end()
            if len(seconds[name]) == options.loads:
                median = statistics.median(seconds[name])
                print(
                    f"{name}: ready after {median:.3f} s, {int(size) / 2**20:.0f} MiB", flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON")
    parser.add_argument("--packed", type=Path, help="the same model by `xinslm export packed`")
    parser.add_argument("--loads", type=int, default=5, help="times that each engine is started")
    parser.add_argument("--kernels", help="kernels to force on our side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=30000, help="ids of the random prompts")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    options = parser.parse_args()
    if options.kernels:
        os.environ["XINSLM_KERNELS"] = options.kernels
    print(describe(("numpy",)), f"load {os.getloadavg()[0]:.1f}", flush=True)
    commands = {"xinslm": [sys.executable]}
    for peer in options.peer:
        name, _, python = peer.partition("=")
        commands[name] = shlex.split(python)
    print_loads(commands, options)
    sides = [Side(n, c, options.file, options.threads) for n, c in commands.items()]
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    compare(sides, load_tokenizer(options.file).encode(text))
    print(f"| row | {' | '.join(s.name for s in sides)} | best peer / ours | verdict |")
    print("|---|" + "---|" * (len(sides) + 2))
    for row in options.rows:
        print(measure(row, sides, options), flush=True)
    memory = [int(side.ask(do="memory")) for side in sides]
    cells = " | ".join(f"{size / 2**20:.0f} MiB" for size in memory)
    print(f"| peak resident memory of the process | {cells} | | |")


def measure(row: str, sides: list[Side], options: argparse.Namespace) -> str:
    """One line of the table: tokens a second, and the ratio to the best peer."""
    what, length, arguments, tokens = ROWS[row]
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(options.rounds + 1):
        # another text each round: OpenVINO keeps what it has read
        rng = random.Random(f"{row} {number}")
        ids = [rng.randrange(options.vocabulary) for _ in range(length)]
        for side in sides if number % 2 == 0 else reversed(sides):
            took = side.ask(do=what, ids=ids, **arguments)
            if took is not None and number > 0:  # the first round warms up
                times[side.name].append(float(took))
    cells = [
        f"{tokens / statistics.median(times[s.name]):,.0f}" if times[s.name] else "-" for s in sides
    ]
    peers = [s.name for s in sides[1:] if times[s.name]]
    if not peers:
        return f"| {row} | {' | '.join(cells)} | | |"
    best = min(peers, key=lambda name: statistics.median(times[name]))
    ratios = sorted(b / a for a, b in zip(times["xinslm"], times[best], strict=True))
    middle = statistics.median(ratios)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    spread = (high - low) / middle
    verdict = f"{best}" if spread <= 0.25 else f"none, spread {spread:.0%}"
    cells.append(f"{middle:.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return f"| {row} | {' | '.join(cells)} | {verdict} |"


if __name__ == "__main__":
    main()
