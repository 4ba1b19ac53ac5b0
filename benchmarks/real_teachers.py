"""Distilled against undistilled students of real teachers, at equal tokens, several seeds; then 4
bits and GGUF.

    python benchmarks/real_teachers.py --data ../shared/data --work /tmp/real --teacher stories5M
    python benchmarks/real_teachers.py --data ../shared/data --work /tmp/real --teacher stories260K

Only commands of the tool run; what is done already is not done again, so a stopped run continues.
Each training takes one thread and `--jobs` of them run at once. Ends with a Markdown table.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import describe
from sides import finished, xinslm

ONE_M = "--preset 1m"
RECIPES = {
    "stories5M": {
        "prepare": "--data-path {data}/text/stories_train.jsonl.gz --validation-path "
        "{data}/text/stories_valid.jsonl.gz",
        "length": 256,
        "train": "--max-seq-length 256 --batch-size 16 --num-epochs 1 --learning-rate 4e-3 "
        "--eval-steps 100",
        "students": {
            "same vocabulary": (None, ONE_M),
            "nested 2,048": (2048, f"{ONE_M} --num-layers 7 --batch-size 8 --max-steps 270"),
        },
    },
    "stories260K": {
        "prepare": "--data-path {data}/text/tinystories_docs.jsonl --document-end bos "
        "--validation-fraction 0.15",
        "length": 512,
        "train": "--max-seq-length 512 --batch-size 2 --num-epochs 8 --learning-rate 4e-3 "
        "--eval-steps 100",
        "students": {
            "same vocabulary": (
                None,
                "--hidden-size 64 --num-layers 3 --num-heads 4 --num-kv-heads 2 --head-dim 16 "
                "--intermediate-size 96",
            )
        },
    },
}


def evaluate(model: Path | str, data: Path, run: Path, name: str) -> dict:
    """Figures of one model on the validation split, kept in `run`."""
    table = run / "evaluation.json"
    rows = json.loads(table.read_text())["rows"] if table.is_file() else []
    if not any(row["name"] == name for row in rows):
        xinslm(f"evaluate {model} --data-path {data} --run {run} --name '{name}'", 1)
        rows = json.loads(table.read_text())["rows"]
    return next(row for row in rows if row["name"] == name)


def spread(rows: list[dict]) -> str:
    """Mean and sample standard deviation of bits per byte."""
    values = [row["bits_per_byte"] for row in rows]
    return (
        f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher", choices=RECIPES, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    recipe, teacher = RECIPES[args.teacher], args.data / "models" / args.teacher
    lines = []
    for student, (vocabulary, shape) in recipe["students"].items():
        work = args.work / args.teacher / student.replace(" ", "-").replace(",", "")
        data, cache, tokenizer = work / "data", work / "cache", teacher
        work.mkdir(parents=True, exist_ok=True)
        if vocabulary:
            tokenizer = work / "tokenizer"
            if not tokenizer.is_dir():
                xinslm(
                    f"tokenizer train --prefix-of {teacher} --vocab-size {vocabulary} "
                    f"--output-dir {tokenizer}",
                    1,
                )
        if not data.is_dir():
            xinslm(
                f"prepare {recipe['prepare'].format(data=args.data)} --tokenizer-path {tokenizer} "
                f"--output-dir {data}"
            )
        if not (cache / "manifest.json").is_file():
            xinslm(
                f"cache {teacher} --data-path {data} --output-dir {cache} --max-seq-length "
                f"{recipe['length']}",
                threads=args.jobs,
            )
        jobs = []
        for seed in range(args.seeds):
            common = f"--data-path {data} {recipe['train']} {shape} --seed {seed}"
            jobs.append((work / f"distilled-{seed}", f"distill {common} --cache {cache}"))
            jobs.append((work / f"undistilled-{seed}", f"pretrain {common}"))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(
                pool.map(
                    lambda job: finished(job[0]) or xinslm(f"{job[1]} --output-dir {job[0]}", 1),
                    jobs,
                )
            )
        rows: dict[str, list[dict]] = {
            "teacher": [evaluate(teacher, data, work / "distilled-0", "teacher")]
        }
        for seed in range(args.seeds):
            run = work / f"distilled-{seed}"
            rows.setdefault("distilled", []).append(evaluate(run, data, run, "student"))
            plain = work / f"undistilled-{seed}"
            rows.setdefault("undistilled", []).append(evaluate(plain, data, plain, "student"))
            for method in ("gptq", "rtn"):
                out = work / f"{method}-{seed}"
                if not out.is_dir():
                    xinslm(
                        f"quantize {run} --data-path {data} --method {method} --output-dir "
                        f"{out} --run {run}",
                        1,
                    )
                rows.setdefault(f"distilled, 4-bit {method}", []).append(
                    evaluate(out, data, run, method)
                )
            gguf = work / f"student-{seed}.gguf"
            if not gguf.is_file():
                xinslm(f"export gguf {work / f'gptq-{seed}'} --output-path {gguf} --run {run}", 1)
        tokens = [
            json.loads((work / f"{kind}-0/checkpoints/last/training_state.json").read_text())[
                "tokens"
            ]
            for kind in ("distilled", "undistilled")
        ]
        assert tokens[0] == tokens[1], "both see the same tokens"
        for name, found in rows.items():
            first = found[0]
            lines.append(
                f"| {student} | {name} | {first['parameters']:,} | "
                f"{first['file_bytes'] / 1e6:.2f} | {spread(found)} | "
                f"{tokens[0] if 'istilled' in name else '-'} |"
            )
        pairs = zip(rows["distilled"], rows["undistilled"], strict=True)
        gains = [b["bits_per_byte"] - a["bits_per_byte"] for a, b in pairs]
        lines.append(
            f"| {student} | gain by the teacher, seed by seed | | | "
            f"{', '.join(f'{g:.4f}' for g in gains)} | |"
        )
    print(f"\n{describe()}\n")
    print(
        "| student | model | parameters | MB | bits per byte | tokens trained on "
        "|\n|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
