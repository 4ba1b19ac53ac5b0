"""Students cut out of a real teacher against students of the same shape drawn at random, several
seeds.

    python benchmarks/initialisation.py --data ../shared/data --work /tmp/initialisation

Both train by Muon on the same rows from the same cache of the teacher; each kind has a learning
rate of its own, the best of `--rates` for seed 0. Only commands of the tool run; what is done
already is not done again, so a stopped run continues. Each training takes one thread and `--jobs`
of them run at once. Ends with Markdown tables: what each cut cost, then the losses, and after how
many tokens the inherited student is where the random one ends.
"""

import argparse
import gzip
import itertools
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import describe
from sides import finished, xinslm

RECIPES = {
    "stories5M": {
        "train": "stories_train.jsonl.gz",
        "prepare": "--validation-path {work}/valid.jsonl",
        "shape": "--num-layers 4 --hidden-size 128 --num-heads 8 --num-kv-heads 4 --head-dim 32 "
        "--intermediate-size 512",
    },
    "stories260K": {
        "train": "tinystories_docs.jsonl",
        "prepare": "--document-end bos --validation-fraction 0.15",
        "shape": "--num-layers 3 --hidden-size 48 --num-heads 8 --num-kv-heads 4 --head-dim 8 "
        "--intermediate-size 128",
    },
}
TRAIN = (
    "--optimizer muon --max-seq-length 256 --max-eval-samples 0 --save-steps 1000 --logging-steps "
    "10 "
    "--device cpu"
)
KINDS = ("random", "inherited")


def first_documents(source: Path, target: Path, count: int | None) -> Path:
    """Copy the first `count` documents of a JSON Lines file, all if None."""
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as lines:
        target.write_text("".join(itertools.islice(lines, count)), encoding="utf-8")
    return target


def curve(run: Path) -> list[tuple[int, float]]:
    """(tokens, validation loss) of a run, as far as it is."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [(row["tokens"], row["validation_ce"]) for row in rows if "validation_ce" in row]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return (
        f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"
    )


def reached(points: list[tuple[int, float]], goal: float) -> float | None:
    """Tokens at which a falling curve first meets `goal`, between two validations by a straight
    line.
    """
    before: tuple[int, float] | None = None
    for tokens, value in points:
        if value <= goal:
            if before is None:
                return tokens
            share = (before[1] - goal) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher", choices=RECIPES, default="stories5M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--documents", type=int, help="stories to train on, at most; all, if not given"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows of 256 tokens in an optimiser step"
    )
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps")
    parser.add_argument("--held-out", type=int, default=100, help="stories to validate on")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    args = parser.parse_args()
    recipe, teacher, work = (
        RECIPES[args.teacher],
        args.data / "models" / args.teacher,
        args.work / args.teacher,
    )
    shape, texts = recipe["shape"], args.data / "text"
    data, cache, student = work / "data", work / "cache", work / "student0"
    work.mkdir(parents=True, exist_ok=True)
    if not data.is_dir():
        text = first_documents(texts / recipe["train"], work / "train.jsonl", args.documents)
        first_documents(texts / "stories_valid.jsonl.gz", work / "valid.jsonl", args.held_out)
        more = recipe["prepare"].format(work=work)
        xinslm(f"prepare --data-path {text} {more} --tokenizer-path {teacher} --output-dir {data}")
    if not (cache / "manifest.json").is_file():
        xinslm(f"cache {teacher} --data-path {data} --output-dir {cache} --max-seq-length 256")
    if not student.is_dir():
        xinslm(
            f"prune {teacher} --data-path {data} --output-dir {student} {shape} --max-seq-length "
            f"256 "
            "--max-eval-samples 1000000 --device cpu"
        )
    losses = json.loads((student / "manifest.json").read_text())["losses"]

    def train(kind: str, seed: int, rate: float) -> Path:
        run = work / f"{kind}-{seed}-{rate:g}"
        begin = f"--init-from {student}" if kind == "inherited" else shape
        if not finished(run):
            xinslm(
                f"distill --data-path {data} --cache {cache} --output-dir {run} {begin} {TRAIN} "
                f"--seed {seed} "
                f"--batch-size {args.batch_size} "
                f"--learning-rate {rate} --max-steps {args.steps} --eval-steps "
                f"{max(1, args.steps // 10)}",
                threads=1,
            )
        return run

    with ThreadPoolExecutor(args.jobs) as pool:
        tried = [(kind, rate) for rate in args.rates for kind in KINDS]
        runs = list(pool.map(lambda job: train(job[0], 0, job[1]), tried))
        tuned = {job: curve(run)[-1][1] for job, run in zip(tried, runs, strict=True)}
        rates = {kind: min(args.rates, key=lambda rate: tuned[kind, rate]) for kind in KINDS}
        jobs = [(kind, seed) for seed in range(args.seeds) for kind in KINDS]
        runs = list(pool.map(lambda job: train(*job, rates[job[0]]), jobs))
    curves = dict(zip(jobs, map(curve, runs), strict=True))
    for seed in range(args.seeds):
        seen = {curves[kind, seed][-1][0] for kind in KINDS}
        assert len(seen) == 1, "both see the same tokens"
    print(f"\n{describe()}\n\n| step of prune | parameters | nats/token |\n|---|---|---|")
    print(
        "\n".join(
            f"| {name} | {parameters:,} | {value:.4f} |" for name, parameters, value in losses
        )
    )
    print(f"\n| learning rate, seed 0 | {' | '.join(KINDS)} |\n|---|---|---|")
    for rate in args.rates:
        print(f"| {rate:g} | " + " | ".join(f"{tuned[kind, rate]:.4f}" for kind in KINDS) + " |")
    print(
        "\n| start | learning rate | at step 0 | at the end | tokens trained on "
        "|\n|---|---|---|---|---|"
    )
    at_start = {"random": losses[-1][2], "inherited": losses[-2][2]}
    for kind in KINDS:
        last = [curves[kind, seed][-1] for seed in range(args.seeds)]
        print(
            f"| {kind} | {rates[kind]:g} | {at_start[kind]:.4f} | "
            f"{spread([value for _, value in last])} | {last[0][0]:,} |"
        )
    print(
        "\n| seed | random's final loss | inherited reaches it after tokens | saved "
        "|\n|---|---|---|---|"
    )
    for seed in range(args.seeds):
        goal, whole = curves["random", seed][-1][1], curves["random", seed][-1][0]
        tokens = reached([(0, at_start["inherited"]), *curves["inherited", seed]], goal)
        saved = (
            "never"
            if tokens is None
            else f"{tokens:,.0f} | {1 - tokens / whole:.0%} ({whole / max(tokens, 1):.1f}x)"
        )
        print(f"| {seed} | {goal:.4f} | {saved} |")


if __name__ == "__main__":
    main()
