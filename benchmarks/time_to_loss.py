"""Wall time to the validation loss at which GKD ends: real teacher, real text, everything allowed on our side.

    python benchmarks/time_to_loss.py --data ../shared/data --work /tmp/core --peer-python trl-venv/bin/python

The peer trains a randomly started student of 1.4M parameters from stories5M for `--steps` steps (the better of the
learning rates given). Ours may do what the tool offers: a cache (its making is inside the time), a student started from
the teacher (`init`, inside the time), packing, another optimiser. Time is of whole commands, loading included; for the
peer it is the training alone. Two threads each, one after another.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from against_gkd import export_documents
from machine import describe
from sides import figures_of, keep, xinslm

HERE = Path(__file__).parent


def peer(args: argparse.Namespace, student: Path, teacher: Path, rows: Path, valid: Path) -> dict:
    """The peer's run with the lowest final loss, with its time."""
    runs = []
    for rate in args.learning_rates:
        run = figures_of(
            [args.peer_python, str(HERE / "peers" / "trl_gkd.py"), "--teacher", str(teacher), "--student", str(student),
             "--rows", str(rows), "--valid", str(valid), "--steps", str(args.steps), "--batch-size", "8",
             "--learning-rate", str(rate), "--warmup", str(args.steps // 20), "--validate-every", str(args.steps // 8)]
        )  # fmt: skip
        print(f"GKD, learning rate {rate}: {run['curve'][-1][2]:.4f} nats after {run['seconds']:.0f} s", flush=True)
        runs.append(run)
    return min(runs, key=lambda run: run["curve"][-1][2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--our-text", type=int, default=120_000, help="tokens of text our side caches and trains on")
    parser.add_argument("--our-settings", default="--batch-size 8 --learning-rate 2e-3 --num-epochs 1")
    parser.add_argument("--validate-every", type=int, default=5)
    args = parser.parse_args()
    work = args.work / "time"
    work.mkdir(parents=True, exist_ok=True)
    teacher, texts = args.data / "models" / "stories5M", args.data / "text"
    data = args.work / "stories"
    base = (
        f"prepare --data-path {texts}/stories_train.jsonl.gz --validation-path {texts}/stories_valid.jsonl.gz "
        f"--tokenizer-path {teacher}"
    )
    if not data.is_dir():
        xinslm(f"{base} --output-dir {data}")
    start = work / "start"
    if not start.is_dir():
        xinslm(
            f"pretrain --data-path {data} --output-dir {work / 'seed'} --preset 1m --max-seq-length 256 --batch-size 1 "
            f"--max-steps 1 --learning-rate 1e-9 --validation-rows 1"
        )
        shutil.copytree((work / "seed" / "checkpoints" / "last").resolve(), start)
    rows = export_documents(data, None, work / "rows.npz", 257)
    valid = export_documents(data, None, work / "valid.npz", 257, "validation")
    best = peer(args, start, teacher, rows, valid)
    goal = best["curve"][-1][2]
    seconds = {}
    for folder in ("small", "cache", "student", "run"):
        shutil.rmtree(work / folder, ignore_errors=True)

    def timed(name: str, line: str) -> None:
        began = time.perf_counter()
        xinslm(line)
        seconds[name] = time.perf_counter() - began

    timed("prepare", f"{base} --max-tokens {args.our_text} --output-dir {work / 'small'}")
    timed(
        "cache",
        f"cache {teacher} --data-path {work / 'small'} --output-dir {work / 'cache'} --max-seq-length 256",
    )
    timed(
        "init",
        f"init {teacher} --data-path {work / 'small'} --output-dir {work / 'student'} "
        "--num-layers 5 --hidden-size 128 --num-heads 4 --num-kv-heads 2 --intermediate-size 320",
    )
    timed(
        "distill",
        f"distill --data-path {work / 'small'} --cache {work / 'cache'} --init-from {work / 'student'} "
        f"--output-dir {work / 'run'} --max-seq-length 256 --validate-every {args.validate_every} --validation-rows 0 "
        f"--save-every 1000000 --log-every 1000000 {args.our_settings}",
    )
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["validation_ce"]) for line in lines if "validation_ce" in line]
    reached = next((step for step, value in curve if value <= goal), None)
    print(describe())
    last = curve[-1]
    if reached is None:
        sys.exit(f"our side ended at {last[1]:.4f} and did not reach {goal:.4f}: give it more text")
    share = reached / last[0]
    ours = seconds["cache"] + seconds["init"] + seconds["distill"] * share
    keep(
        args.work,
        "wall time to GKD's final loss",
        {"goal nats": goal, "gkd seconds": best["seconds"], "our seconds": ours, "ratio": best["seconds"] / ours,
         "of which": seconds, "reached at step": reached, "of steps": last[0], "our final nats": last[1],
         "our whole time": sum(seconds.values()) - seconds["prepare"]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
