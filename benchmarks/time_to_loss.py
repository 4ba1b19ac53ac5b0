"""Wall time to the validation loss at which GKD ends: real teacher, real text, everything allowed
on our side.

    python benchmarks/time_to_loss.py --data ../shared/data --work /tmp/core --peer-python
    trl-venv/bin/python

The peer trains a randomly started student of 1.4M parameters from stories5M over one pass of the
stories (the better of the learning rates given). Ours may do what the tool offers: three ways, each
a chain of whole commands, loading, cache, initialisation and their own small validations inside the
time; the preparation of the text is outside on both sides. Of the peer's time only its training
counts. Each result is then measured by the peer's own program on the same held-out stories. Two
threads each, one after another.
"""

import argparse
import shutil
import time
from pathlib import Path

from against_gkd import export_documents
from machine import describe
from sides import figures_of, keep, xinslm

HERE = Path(__file__).parent
SHAPE = "--num-layers 5 --hidden-size 128 --num-heads 4 --num-kv-heads 2 --intermediate-size 320"
CHECKS = (
    "--max-seq-length 256 --num-calibration-samples 48 --num-search-samples 8 --max-eval-samples 4"
)
QUIET = (
    "--max-seq-length 256 --batch-size 8 --eval-steps 1000000 --save-steps 1000000 "
    "--logging-steps 50"
)
WAYS = {
    "prune": ("prune",),
    "prune, cache, distill": (
        "prune",
        "cache",
        "distill --init-from {work}/prune --learning-rate 2e-3",
    ),
    "random start, cache, Muon": (
        "cache",
        "distill --preset 1m --optimizer muon --learning-rate 4e-3 --num-epochs 2",
    ),
}
"""Our ways from a teacher and a text to a student."""


def peer(args: argparse.Namespace, program: list[str], rows: Path) -> dict:
    """The peer's run with the lowest final loss, with its time."""
    runs = []
    for rate in args.learning_rates:
        run = figures_of(
            [
                *program,
                "--rows",
                str(rows),
                "--steps",
                str(args.steps),
                "--batch-size",
                "8",
                "--learning-rate",
                str(rate),
                "--warmup",
                str(args.steps // 20),
                "--eval-steps",
                str(args.steps),
            ]
        )
        print(
            f"GKD, learning rate {rate}: {run['curve'][-1][2]:.4f} nats after "
            f"{run['seconds']:.0f} s",
            flush=True,
        )
        runs.append(run)
    return min(runs, key=lambda run: run["curve"][-1][2])


def ours(work: Path, teacher: Path, data: Path, steps: tuple[str, ...]) -> dict[str, float]:
    """Run a chain of commands from nothing; seconds of each."""
    lines = {
        "prune": f"prune {teacher} --data-path {data} --output-dir {work}/prune {SHAPE} {CHECKS}",
        "cache": f"cache {teacher} --data-path {data} --output-dir {work}/cache --max-seq-length "
        "256",
        "distill": f"--data-path {data} --cache {work}/cache --output-dir {work}/run "
        f"--max-eval-samples 8 {QUIET}",
    }
    seconds = {}
    for step in steps:
        name, _, options = step.partition(" ")
        line = (
            lines[name]
            if name != "distill"
            else f"distill {options.format(work=work)} {lines[name]}"
        )
        began = time.perf_counter()
        xinslm(line)
        seconds[name] = time.perf_counter() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument(
        "--steps", type=int, default=514, help="the peer's, of 8 stories; 514 are all of them"
    )
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 6e-3])
    parser.add_argument(
        "--our-text",
        type=int,
        nargs=3,
        default=[30_000, 120_000, 250_000],
        help="tokens of text each of our ways reads",
    )
    args = parser.parse_args()
    work = args.work / "time"
    work.mkdir(parents=True, exist_ok=True)
    print(describe(), flush=True)
    teacher, texts = args.data / "models" / "stories5M", args.data / "text"
    prepare = f"prepare --data-path {texts}/stories_train.jsonl.gz --tokenizer-path {teacher}"
    data = args.work / "stories"
    if not data.is_dir():
        xinslm(f"{prepare} --validation-path {texts}/stories_valid.jsonl.gz --output-dir {data}")
    start = work / "start"
    if not start.is_dir():
        xinslm(
            f"pretrain --data-path {data} --output-dir {work / 'seed'} --preset 1m "
            "--max-seq-length 256 --batch-size 1 "
            f"--max-steps 1 --learning-rate 1e-9 --max-eval-samples 1"
        )
        shutil.copytree((work / "seed" / "checkpoints" / "last").resolve(), start)
    rows = export_documents(data, None, work / "rows.npz", 257)
    valid = export_documents(data, None, work / "valid.npz", 257, "validation")
    program = [
        args.peer_python,
        str(HERE / "peers" / "trl_gkd.py"),
        "--teacher",
        str(teacher),
        "--valid",
        str(valid),
    ]
    best = peer(args, [*program, "--student", str(start)], rows)
    goal = best["curve"][-1][2]
    found: dict[str, dict] = {}
    for (way, steps), tokens in zip(WAYS.items(), args.our_text, strict=True):
        small, folder = work / f"small-{tokens}", work / way.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        if not small.is_dir():
            xinslm(
                f"{prepare} --validation-fraction 0.03 --max-tokens {tokens} --output-dir {small}"
            )
        seconds = ours(folder, teacher, small, steps)
        student = (
            folder / "prune"
            if steps[-1] == "prune"
            else (folder / "run" / "checkpoints" / "last").resolve()
        )
        value = figures_of(
            [*program, "--student", str(student), "--rows", str(valid), "--steps", "0"]
        )["validation"]
        whole = sum(seconds.values())
        found[way] = {
            "nats": value,
            "seconds": whole,
            "of which": seconds,
            "reached": value <= goal,
            "ratio": best["seconds"] / whole,
        }
        print(f"{way}: {value:.4f} nats after {whole:.0f} s", flush=True)
    values = {
        "goal nats": goal,
        "gkd seconds": best["seconds"],
        "gkd steps": args.steps,
        "ours": found,
    }
    keep(args.work, "wall time to GKD's final loss", values)


if __name__ == "__main__":
    main()
