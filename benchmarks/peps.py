"""A small model pre-trained on the PEPs: its curve, then 4 bits and GGUF.

    python benchmarks/peps.py --data ../shared/data --work /tmp/real

Only commands of the tool run, from the raw text on; what is done is not done again.
"""

import argparse
import json
from pathlib import Path

from machine import describe
from real_teachers import evaluate
from sides import finished, xinslm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    work = args.work / "peps"
    work.mkdir(parents=True, exist_ok=True)
    text, data, run = args.data / "text" / "peps.jsonl.gz", work / "data", work / "run"
    if not (work / "tokenizer").is_dir():
        xinslm(
            f"tokenizer train --data-path {text} --vocab-size 4096 --output-dir "
            f"{work / 'tokenizer'}"
        )
    if not data.is_dir():
        xinslm(
            f"prepare --data-path {text} --tokenizer-path {work / 'tokenizer'} --output-dir {data}"
        )
    if not finished(run):
        xinslm(
            f"pretrain --data-path {data} --output-dir {run} --preset 1m --max-seq-length 256 "
            "--batch-size 8 "
            f"--max-steps {args.steps} --learning-rate 4e-3 --eval-steps 100",
            threads=2,
        )
    if not (work / "gptq-0").is_dir():
        xinslm(f"quantize {run} --data-path {data} --output-dir {work / 'gptq-0'} --run {run}")
        xinslm(f"export gguf {work / 'gptq-0'} --output-path {work / 'student-0.gguf'} --run {run}")
    full = evaluate(run, data, run, "pretrained")
    small = evaluate(work / "gptq-0", data, run, "gptq")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(f"{describe()}\n\n{full['parameters']:,} parameters, rows of 256\n")
    print("| tokens | validation nats a token |\n|---|---|")
    for line in lines:
        if "validation_ce" in line:
            print(f"| {line['tokens']:,} | {line['validation_ce']:.4f} |")
    print(f"\nbits per byte {full['bits_per_byte']:.4f}; 4-bit {small['bits_per_byte']:.4f}")


if __name__ == "__main__":
    main()
