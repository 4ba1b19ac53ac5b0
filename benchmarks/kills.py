"""kill -9 at random moments of `cache` and `distill`, repeatedly; results compared with an
uninterrupted run.

    python benchmarks/kills.py --data ../shared/data --work /tmp/core --kills 20

Each command is started again after every kill until it has finished, then in another folder, until
it was killed `--kills` times in total. Compared with an uninterrupted run are the cache's shards,
the final weights (bytes) and every line of metrics.jsonl except times. Every second cache has one
shard per split, so its kills are inside a shard.
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
from collections.abc import Callable
from pathlib import Path

from machine import describe
from sides import finished, keep, xinslm

from xinslm.files import sha256_file


def disturbed(
    line: str, folder: Path, watched: str, draw: random.Random, complete: Callable[[], bool]
) -> int:
    """Run a command that writes to `folder` and kill it, until it has finished; return the kills.

    One moment in four is uniform over the time since the start, so that loading and continuing are
    hit as well; the others follow the first sign of new work, a newer time of the files that match
    `watched`.
    """
    kills = 0
    while not complete():
        before = _newest(folder, watched)
        process = subprocess.Popen(
            [sys.executable, "-m", "xinslm", *shlex.split(line), "--output-dir", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        early = draw.random() < 0.25
        last = time.monotonic() + draw.uniform(0, 10)
        while not early and process.poll() is None and _newest(folder, watched) == before:
            time.sleep(0.02)
            last = time.monotonic() + draw.uniform(0, 3)
        try:
            if process.wait(max(0.0, last - time.monotonic())):
                sys.exit(
                    f"ended with {process.returncode} after {kills} kills: {line} "
                    f"--output-dir {folder}"
                )
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    return kills


def _newest(folder: Path, watched: str) -> int:
    """When a matching file of the folder was last written, in ns; 0 if there is none."""
    return max((path.stat().st_mtime_ns for path in folder.glob(watched)), default=0)


def curve(run: Path) -> list[dict]:
    """The lines of a run's metrics, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "other_load")}
        for line in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        f"prepare --data-path {args.data}/text/stories_train.jsonl.gz --document-end bos "
        f"--tokenizer-path {teacher} "
        f"--output-dir {data} --max-tokens 300000"
    )
    line = f"cache {teacher} --data-path {data} --max-seq-length 256 --batch-tokens 2048"
    sizes = {"cache": "--shard-positions 2000", "large": ""}
    shards = {}
    for name, size in sizes.items():
        xinslm(f"{line} {size} --output-dir {work / name}", threads=1)
        shards[name] = sorted((work / name).glob("*/*.bin"))
    kills, equal, number = 0, True, 0
    while kills < args.kills:
        folder = work / f"cache-{number}"
        name = list(sizes)[number % 2]
        complete = (folder / "manifest.json").exists
        kills += disturbed(f"{line} {sizes[name]}", folder, "*/*.*", draw, complete)
        equal &= all(
            sha256_file(file) == sha256_file(folder / file.relative_to(work / name))
            for file in shards[name]
        )
        number += 1
    found = {"cache killed": kills, "in runs": number, "shards equal": equal}
    line = (
        f"distill --data-path {data} --cache {work / 'cache'} --max-seq-length 256 --batch-size 4 "
        "--hidden-size 64 "
        "--num-layers 4 --num-heads 4 --num-kv-heads 2 --head-dim 16 --intermediate-size 160 "
        "--max-steps 400 "
        f"--save-steps 5 --eval-steps 30 --logging-steps 1"
    )
    xinslm(f"{line} --output-dir {work / 'run'}", threads=1)
    whole, weights = (
        curve(work / "run"),
        sha256_file(work / "run" / "checkpoints" / "last" / "model.safetensors"),
    )
    kills, same, bytes_same, number, largest = 0, True, True, 0, 0.0
    while kills < args.kills:
        run = work / f"run-{number}"
        kills += disturbed(line, run, "metrics.jsonl", draw, lambda run=run: finished(run))
        lines = curve(run)
        same &= lines == whole
        largest = max(
            largest,
            *(abs(a.get("loss", 0) - b.get("loss", 0)) for a, b in zip(whole, lines, strict=True)),
        )
        bytes_same &= sha256_file(run / "checkpoints" / "last" / "model.safetensors") == weights
        number += 1
    found |= {
        "training killed": kills,
        "in training runs": number,
        "curve equal": same,
        "largest difference of a loss": largest,
        "weights equal": bytes_same,
    }
    print(describe())
    keep(args.work, "kill -9", found)


if __name__ == "__main__":
    main()
