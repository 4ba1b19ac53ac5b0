"""Students with a vocabulary of their own, of two real teachers with other tokenizers: bits per
byte on held-out text.

    python benchmarks/other_tokenizers.py --data ../shared/data --work /tmp/other

stories260K (512 sentencepiece tokens) and babyllama105 (105 characters) teach a student with a BPE
trained on the text, by prefixes, alone and both at once, and by 2,000 texts they wrote themselves,
which come to the others; the same student learns without a teacher: same steps, same start, per
seed. Only commands of the tool run; what is done already is not done again. One thread a training,
`--jobs` of them at once. Measured is each run's best checkpoint, since the text is small and seen
many times. Ends with a table.
"""

import argparse
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from machine import describe
from real_teachers import evaluate, spread
from sides import finished, xinslm

from xinslm.data.dataset import open_dataset
from xinslm.tokenizer.load import load_tokenizer

TEACHERS = {"stories260K": 512, "babyllama105": 256}
"""Teacher -> its context in tokens."""
WRITTEN = 2000
"""Texts that a teacher writes."""
SHAPE = (
    "--hidden-size 64 --num-layers 3 --num-heads 4 --num-kv-heads 2 --head-dim 16 "
    "--intermediate-size 96"
)
WAYS = {
    "byte_prefix": ("byte_prefix", ""),
    "texts it wrote": (None, ""),
    "texts it wrote, prefixes": ("byte_prefix", ""),
}
"""Row of the table -> alignment, options of the loss."""
BOTH = "both"


def split_texts(data: Path, work: Path) -> None:
    """Write each split's documents as JSON lines, and beginnings of sentences as prompts."""
    tokenizer, dataset = load_tokenizer(data / "tokenizer"), open_dataset(data)
    control = set(tokenizer.special_tokens.values())
    for name in ("train", "validation"):
        split = dataset.split(name)
        texts = [
            tokenizer.decode([int(i) for i in split.tokens[a:b] if int(i) not in control])
            for a, b in pairwise(split.documents)
        ]
        (work / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
        if name == "train":
            draw, prompts = random.Random(0), []
            for text in texts:
                flat = " ".join(text.split())
                for begin in (0, *(match.end() for match in re.finditer(r'[.!?"] ', flat))):
                    words = flat[begin : begin + draw.randint(24, 64)].rpartition(" ")[0]
                    if len(words) >= 16:
                        prompts.append(words)
            draw.shuffle(prompts)
            (work / "prompts.txt").write_text("\n".join(prompts[:WRITTEN]) + "\n")


def with_written(data: Path, teacher: Path, context: int, work: Path) -> Path:
    """The dataset and the texts that a teacher wrote; measured on the same documents."""
    written, both = work / f"written-{teacher.name}", work / f"data-{teacher.name}"
    if not (work / "prompts.txt").is_file():
        split_texts(data, work)
    if not (written / "manifest.json").is_file():
        xinslm(
            f"synthesize {teacher} --prompts {work}/prompts.txt --output-dir {written} "
            f"--max-new-tokens {context - 66} "
            f"--temperature 0.8 --tokenizer-path {data}/tokenizer --no-keep-cache --batch-size "
            f"64 "
            "--document-end bos "
            f"--max-seq-length {context}"
        )
    if not both.is_dir():
        xinslm(
            f"prepare --data-path {work}/train.jsonl {written}/text.jsonl --validation-path "
            f"{work}/validation.jsonl "
            f"--document-end bos --tokenizer-path {data}/tokenizer --output-dir {both}"
        )
    return both


def _run(work: Path, teacher: str, row: str, seed: int) -> Path:
    return work / f"{teacher}-{row.replace(', ', '-').replace(' ', '-')}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--training",
        default="--optimizer muon --learning-rate 4e-3",
        help="options of all students",
    )
    args = parser.parse_args()
    text, work = args.data / "text" / "tinystories_docs.jsonl", args.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, data = work / "tokenizer", work / "data"
    if not tokenizer.is_dir():
        xinslm(
            f"tokenizer train --data-path {text} --vocab-size {args.vocab_size} --output-dir "
            f"{tokenizer}"
        )
    if not data.is_dir():
        xinslm(
            f"prepare --data-path {text} --document-end bos --validation-fraction 0.15 "
            f"--tokenizer-path {tokenizer} "
            f"--output-dir {data}"
        )
    facts = {}
    jobs = []
    train = f"--max-seq-length 256 --batch-size 4 --max-steps {args.steps} {args.training}"
    train += f" --eval-steps 50 --max-eval-samples 0 {SHAPE}"
    for seed in range(args.seeds):
        jobs.append(
            (work / f"undistilled-{seed}", f"pretrain --data-path {data} {train} --seed {seed}")
        )
    for teacher, context in TEACHERS.items():
        for row in args.ways:
            way, weights = WAYS[row]
            of_row = data
            if row.startswith("texts"):
                of_row = with_written(data, args.data / "models" / teacher, context, work)
            line = f"--data-path {of_row} {train} {weights}"
            facts[teacher, row] = None
            if way is not None:
                cache = work / f"cache-{of_row.name}-{teacher}-{way}"
                if not (cache / "manifest.json").is_file():
                    xinslm(
                        f"cache {args.data / 'models' / teacher} --data-path {of_row} "
                        f"--output-dir {cache} "
                        f"--alignment {way} --max-seq-length {context}"
                    )
                facts[teacher, row] = json.loads((cache / "manifest.json").read_text())["alignment"]
                line += f" --cache {cache}"
            for seed in range(args.seeds):
                command = "pretrain" if way is None else "distill"
                jobs.append((_run(work, teacher, row, seed), f"{command} {line} --seed {seed}"))
    if "byte_prefix" in args.ways:
        facts[BOTH, "byte_prefix"] = None
        first, second = (work / f"cache-{data.name}-{teacher}-byte_prefix" for teacher in TEACHERS)
        line = f"distill --data-path {data} {train} --cache {first} --more-caches {second}"
        jobs += [
            (_run(work, BOTH, "byte_prefix", seed), f"{line} --seed {seed}")
            for seed in range(args.seeds)
        ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(
            pool.map(
                lambda job: finished(job[0]) or xinslm(f"{job[1]} --output-dir {job[0]}", 1), jobs
            )
        )
    print(f"\n{describe()}\n")
    print(
        "| teacher | way | share of targets | bits per byte | gain, seed by seed "
        "|\n|---|---|---|---|---|"
    )
    plain = [
        evaluate(work / f"undistilled-{s}", data, work / f"undistilled-{s}", "m")
        for s in range(args.seeds)
    ]
    print(f"| none | | | {spread(plain)} | |")
    for (teacher, row), alignment in facts.items():
        runs = [_run(work, teacher, row, seed) for seed in range(args.seeds)]
        rows = [evaluate(run, data, run, "m") for run in runs]
        gains = [a["bits_per_byte"] - b["bits_per_byte"] for a, b in zip(plain, rows, strict=True)]
        share = f"{alignment['covered'] / alignment['targets']:.1%}" if alignment else ""
        listed = ", ".join(f"{gain:+.4f}" for gain in gains)
        print(f"| {teacher} | {row} | {share} | {spread(rows)} | {listed} |")


if __name__ == "__main__":
    main()
