"""The optimisers on real stories: validation loss at equal steps, over learning rates and seeds,
and a step's time.

    python benchmarks/optimizers.py --data ../shared/data --work /tmp/optimizers

A 1.2M student (preset 1m) with the tokenizer of stories5M, steps of 8 rows of 256, cross-entropy,
schedule and all else as by default. Every seed changes starting weights and order. The optimisers'
own time is measured apart from the runs, on the same gradients, and given as a share of a step:
validation at equal wall time follows from both. Finished runs are kept in `--work`, so a stopped
benchmark continues.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import describe

from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.losses.config import LossConfig
from xinslm.model.config import PRESETS, ModelConfig
from xinslm.model.param_dtype import cast_matrices_to_bfloat16
from xinslm.model.transformer import Transformer
from xinslm.train.config import PretrainConfig
from xinslm.train.packed import packed_trainer
from xinslm.train.row_sampler import Source

VARIANTS = {
    "adamw": [],
    "adamw8bit": ["--optimizer", "adamw8bit"],
    "adamw, bfloat16 weights": ["--param-dtype", "bfloat16"],
    "muon": ["--optimizer", "muon"],
}


def train(args: argparse.Namespace, variant: str, rate: float, seed: int) -> float:
    """Best validation cross-entropy of a run, nats a token."""
    run = args.work / f"{variant.replace(', ', '-').replace(' ', '-')}-{rate:g}-{args.steps}-{seed}"
    if not (run / "done.json").is_file():
        command = [
            sys.executable,
            "-m",
            "xinslm",
            "pretrain",
            "--data-path",
            str(args.work / "data"),
            "-o",
            str(run),
            "--max-seq-length",
            "256",
            "--batch-size",
            "8",
            "--max-steps",
            str(args.steps),
            "--eval-steps",
            str(args.steps),
            "--learning-rate",
            str(rate),
            "--seed",
            str(seed),
            *VARIANTS[variant],
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "done.json").write_text(
            json.dumps([x["validation_ce"] for x in lines if "validation_ce" in x][-1])
        )
    return float(json.loads((run / "done.json").read_text()))


def times(args: argparse.Namespace, variant: str) -> tuple[float, float]:
    """Least seconds of a whole step and of the optimiser in it, over a few steps."""
    flags = dict(zip(VARIANTS[variant][::2], VARIANTS[variant][1::2], strict=True))
    config = PretrainConfig(
        data_path=args.work,
        output_dir=args.work,
        max_seq_length=256,
        batch_size=8,
        optimizer=flags.get("--optimizer", "adamw"),
        param_dtype=flags.get("--param-dtype", "float32"),
    )
    dataset = open_dataset(args.work / "data")
    preset = PRESETS["1m"]
    model = Transformer(ModelConfig(vocab_size=dataset.manifest["vocab_size"], **vars(preset)))
    model.initialise(torch.Generator().manual_seed(0))
    if config.param_dtype == "bfloat16":
        cast_matrices_to_bfloat16(model)
        model.compute_dtype = torch.float32
    rows = PackedDataset(dataset.split("train"), 256)
    trainer = packed_trainer(model, config, Source(rows, None, LossConfig(1.0, 0.0)), 9)
    whole, inside = [], []
    for number in range(6):
        began = time.perf_counter()
        trainer.step(number)
        whole.append(time.perf_counter() - began)
    for _ in range(6):  # the gradients of the last step are still there
        began = time.perf_counter()
        trainer.optimizer.step()
        inside.append(time.perf_counter() - began)
    return min(whole), min(inside)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "data" / "manifest.json").is_file():
        text = args.data / "text"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "xinslm",
                "prepare",
                "--data-path",
                str(text / "stories_train.jsonl.gz"),
                "--validation-path",
                str(text / "stories_valid.jsonl.gz"),
                "--tokenizer-path",
                str(args.data / "models" / "stories5M"),
                "-o",
                str(args.work / "data"),
            ],
            check=True,
            capture_output=True,
        )
    print(f"{describe()}\n{args.steps} steps of 8 x 256\n")
    print(
        "| optimiser | learning rate | validation, nats a token: median (lowest-highest) of "
        "seeds | runs |"
    )
    print("|---|---|---|---|")
    for variant in args.variants:
        for rate in args.rates:
            found = [train(args, variant, rate, seed) for seed in range(args.seeds)]
            middle = statistics.median(found)
            print(
                f"| {variant} | {rate:g} | {middle:.3f} ({min(found):.3f}-{max(found):.3f}) | "
                f"{len(found)} |",
                flush=True,
            )
    print("\n| optimiser | its share of a step's time |\n|---|---|")
    for variant in args.variants:
        whole, inside = times(args, variant)
        print(f"| {variant} | {inside / whole:.1%} |", flush=True)


if __name__ == "__main__":
    main()
