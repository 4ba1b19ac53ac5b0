"""kill -9 at random moments of `cache` and `distill`, again and again; what comes out against an undisturbed run.

    python benchmarks/kills.py --data ../shared/data --work /tmp/core --kills 20

Both commands are started anew after each kill until they have been killed `--kills` times, then left to finish. Compared
are the cache's shards, the final weights (bytes) and every line of metrics.jsonl but its times.
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


def killed_often(line: str, kills: int, longest: float, draw: random.Random, finished: Path) -> int:
    """Run a command, killing it after random times; return how often that came before its end."""
    done = 0
    while done < kills and not finished.exists():
        process = subprocess.Popen(
            [sys.executable, "-m", "xinslm", *shlex.split(line)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(draw.uniform(0.5, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
    if not finished.exists():
        xinslm(line, threads=1)
    return done


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
    caches = {name: work / f"cache-{name}" for name in ("whole", "killed")}
    lines = {
        name: f"cache {teacher} --data-path {data} --output-dir {folder} --max-seq-length 256 --shard-positions 2000"
        for name, folder in caches.items()
    }
    began = time.monotonic()
    xinslm(lines["whole"], threads=1)
    longest = max(4.0, time.monotonic() - began)
    cache_kills = killed_often(lines["killed"], args.kills, longest, draw, caches["killed"] / "manifest.json")
    shards = [p.relative_to(caches["whole"]) for p in sorted(caches["whole"].glob("*/*.bin"))]
    same_cache = all(sha256_file(caches["whole"] / s) == sha256_file(caches["killed"] / s) for s in shards)
    runs = {name: work / f"run-{name}" for name in ("whole", "killed")}
    began = time.monotonic()
    for name, run in runs.items():
        line = (
            f"distill --data-path {data} --cache {caches['whole']} --output-dir {run} --max-seq-length 256 --batch-size 4 "
            f"--hidden-size 64 --num-layers 4 --num-heads 4 --num-kv-heads 2 --head-dim 16 --intermediate-size 160 "
            f"--max-steps 150 --save-every 5 --validate-every 30 --log-every 1"
        )
        if name == "whole":
            xinslm(line, threads=1)
            longest = max(6.0, (time.monotonic() - began) / 2)
        else:
            kills = killed_often(line, args.kills, longest, draw, run / "checkpoints" / "step-000150")
    a, b = curve(runs["whole"]), curve(runs["killed"])
    difference = max(abs(x.get("loss", 0) - y.get("loss", 0)) for x, y in zip(a, b, strict=True))
    weights = [sha256_file(run / "checkpoints" / "last" / "model.safetensors") for run in runs.values()]
    print(describe())
    keep(
        args.work,
        "kill -9",
        {"cache killed": cache_kills, "shards equal": same_cache, "training killed": kills, "curve equal": a == b,
         "largest difference of a loss": difference, "weights equal": weights[0] == weights[1]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
