"""kill -9 at random moments of `cache` and `distill`, again and again; what comes out against an undisturbed run.

    python benchmarks/kills.py --data ../shared/data --work /tmp/core --kills 20

Each command is started again after every kill until it has finished, and then anew in another folder, until it has been
killed `--kills` times in all. Compared with an undisturbed run are, each time, the cache's shards, the final weights
(bytes) and every line of metrics.jsonl but its times.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import describe
from sides import keep, xinslm

from xinslm.files import sha256_file


def disturbed(line: str, longest: float, draw: random.Random, finished: Path) -> int:
    """Run a command again and again, killing it after random times, until it has finished; return the kills."""
    kills = 0
    while not finished.exists():
        process = subprocess.Popen(
            [sys.executable, "-m", "xinslm", *shlex.split(line)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(draw.uniform(longest / 3, longest))  # before that, most of the time, nothing but loading
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    return kills


def curve(run: Path) -> list[dict]:
    """The lines of a run's metrics, times left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work, draw = args.work / "kills", random.Random(args.seed)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    teacher, data = args.data / "models" / "stories260K", work / "data"
    xinslm(
        f"prepare --data-path {args.data}/text/tinystories_docs.jsonl --document-end bos --tokenizer-path {teacher} "
        f"--output-dir {data}"
    )
    line = f"cache {teacher} --data-path {data} --max-seq-length 256 --shard-positions 2000 --output-dir "
    began = time.monotonic()
    xinslm(line + str(work / "cache"), threads=1)
    longest = time.monotonic() - began
    shards = [p.relative_to(work / "cache") for p in sorted((work / "cache").glob("*/*.bin"))]
    kills, equal, number = 0, True, 0
    while kills < args.kills:
        folder = work / f"cache-{number}"
        kills += disturbed(line + str(folder), longest, draw, folder / "manifest.json")
        equal &= all(sha256_file(work / "cache" / s) == sha256_file(folder / s) for s in shards)
        number += 1
    found = {"cache killed": kills, "in runs": number, "shards equal": equal}
    line = (
        f"distill --data-path {data} --cache {work / 'cache'} --max-seq-length 256 --batch-size 4 --hidden-size 64 "
        f"--num-layers 4 --num-heads 4 --num-kv-heads 2 --head-dim 16 --intermediate-size 160 --max-steps 150 "
        f"--save-every 5 --validate-every 30 --log-every 1 --output-dir "
    )
    began = time.monotonic()
    xinslm(line + str(work / "run"), threads=1)
    longest = (time.monotonic() - began) / 2
    whole, weights = curve(work / "run"), sha256_file(work / "run" / "checkpoints" / "last" / "model.safetensors")
    kills, same, bytes_same, number, largest = 0, True, True, 0, 0.0
    while kills < args.kills:
        run = work / f"run-{number}"
        kills += disturbed(line + str(run), longest, draw, run / "checkpoints" / "step-000150")
        lines = curve(run)
        same &= lines == whole
        largest = max(largest, *(abs(a.get("loss", 0) - b.get("loss", 0)) for a, b in zip(whole, lines, strict=True)))
        bytes_same &= sha256_file(run / "checkpoints" / "last" / "model.safetensors") == weights
        number += 1
    found |= {"training killed": kills, "in training runs": number, "curve equal": same,
              "largest difference of a loss": largest, "weights equal": bytes_same}  # fmt: skip
    print(describe())
    keep(args.work, "kill -9", found)


if __name__ == "__main__":
    main()
