"""Students with a vocabulary of their own, of two real teachers with other tokenizers: bits per byte on held-out text.

    python benchmarks/other_tokenizers.py --data ../shared/data --work /tmp/other

stories260K (512 sentencepiece tokens) and babyllama105 (105 characters) teach a student with a BPE trained on the text,
by bytes, by chunks, and the same student learns without a teacher: same steps, same rows, same start, per seed. Only
commands of the tool run; what is done already is not done again. One thread a training, two at once. Measured is each
run's best checkpoint, since the text is small and seen several times. Ends with a table.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import describe
from real_teachers import evaluate, spread
from sides import finished, xinslm

TEACHERS = {"stories260K": 512, "babyllama105": 256}
"""Teacher -> its context in tokens."""
SHAPE = "--hidden-size 64 --num-layers 3 --num-heads 4 --num-kv-heads 2 --head-dim 16 --intermediate-size 96"
WAYS = {
    "bytes": ("bytes", ""),
    "chunks": ("chunks", ""),
    "chunks beside the whole text": ("chunks", "--loss.alpha 1 --loss.beta 1"),
}
"""Row of the table -> alignment, options of the loss; its defaults are alpha 0.1, beta 0.9."""


def _run(work: Path, teacher: str, row: str, seed: int) -> Path:
    return work / f"{teacher}-{row.replace(' ', '-')}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--training", default="--optimizer muon --learning-rate 4e-3", help="options of all students")
    args = parser.parse_args()
    text, work = args.data / "text" / "tinystories_docs.jsonl", args.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, data = work / "tokenizer", work / "data"
    if not tokenizer.is_dir():
        xinslm(f"tokenizer train --data-path {text} --vocab-size {args.vocab_size} --output-dir {tokenizer}")
    if not data.is_dir():
        xinslm(
            f"prepare --data-path {text} --document-end bos --validation-fraction 0.15 --tokenizer-path {tokenizer} "
            f"--output-dir {data}"
        )
    facts = {}
    jobs = []
    train = f"--data-path {data} --max-seq-length 256 --batch-size 4 --max-steps {args.steps} {args.training}"
    train += f" --validate-every 50 --validation-rows 0 {SHAPE}"
    for seed in range(args.seeds):
        jobs.append((work / f"undistilled-{seed}", f"pretrain {train} --seed {seed}"))
    for teacher, context in TEACHERS.items():
        for row, (way, weights) in WAYS.items():
            cache = work / f"cache-{teacher}-{way}"
            if not (cache / "manifest.json").is_file():
                xinslm(
                    f"cache {args.data / 'models' / teacher} --data-path {data} --output-dir {cache} --alignment {way} "
                    f"--max-seq-length {context}"
                )
            facts[teacher, row] = json.loads((cache / "manifest.json").read_text())["alignment"]
            for seed in range(args.seeds):
                jobs.append(
                    (_run(work, teacher, row, seed), f"distill {train} --cache {cache} {weights} --seed {seed}")
                )
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: finished(job[0]) or xinslm(f"{job[1]} --output-dir {job[0]}", 1), jobs))
    print(f"\n{describe()}\n")
    print("| teacher | way | share of targets | bits per byte | gain, seed by seed |\n|---|---|---|---|---|")
    plain = [evaluate(work / f"undistilled-{s}", data, work / f"undistilled-{s}", "m") for s in range(args.seeds)]
    print(f"| none | | | {spread(plain)} | |")
    for (teacher, row), alignment in facts.items():
        runs = [_run(work, teacher, row, seed) for seed in range(args.seeds)]
        rows = [evaluate(run, data, run, "m") for run in runs]
        gains = [a["bits_per_byte"] - b["bits_per_byte"] for a, b in zip(plain, rows, strict=True)]
        share = alignment["covered"] / alignment["targets"]
        listed = ", ".join(f"{gain:+.4f}" for gain in gains)
        print(f"| {teacher} | {row} | {share:.1%} | {spread(rows)} | {listed} |")


if __name__ == "__main__":
    main()
