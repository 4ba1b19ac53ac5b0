"""`pretrain` against transformers' Trainer: the same weights, the same packed rows, tokens/s and
peak memory.

    python benchmarks/pretrain_vs_trainer.py --dataset DATASET --work /tmp/vs --peer-python
    hf-venv/bin/python

Both sides run as processes of their own, in turn (A B A B ...); the loss of the first batch is
compared before anything is timed. Medians over rounds, the ratio per round. Every row's attention
stays inside its documents on both sides.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from machine import describe

from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.train.row_sampler import indices_of_step

OURS = """
import json, resource, sys, time
from pathlib import Path
import numpy as np, torch
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.train.config import PretrainConfig
from xinslm.losses.config import LossConfig
from xinslm.train.packed import packed_trainer
from xinslm.train.row_sampler import Source
from xinslm.model.files import load_model
model, data, length, batch, steps, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
config = PretrainConfig(data_path=Path(data), output_dir=Path("unused"), max_seq_length=int(length), batch_size=int(batch))
rows = PackedDataset(open_dataset(Path(data)).split("train"), int(length))
trainer = packed_trainer(load_model(model), config, Source(rows, None, LossConfig(1.0, 0.0)), int(steps))
speeds, first = [], None
for number in range(int(steps)):
    began = time.perf_counter()
    step = trainer.step(number)
    speeds.append(step.tokens / (time.perf_counter() - began))
    first = step.loss if first is None else first
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"first_loss": first, "tokens_per_second": float(np.median(speeds[1:])), "peak_mib": round(peak)}))
"""


def run(command: list[str]) -> dict:
    """Run a side; its last line of output is JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--presets", nargs="+", default=["1m", "10m"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = PackedDataset(open_dataset(args.dataset).split("train"), args.length)
    order = np.concatenate(
        [indices_of_step(s, args.batch_size, len(rows), 0) for s in range(args.steps)]
    )
    batch = rows.batch(order)
    np.savez(
        args.work / "rows.npz",
        input_ids=batch.input_ids,
        labels=batch.labels,
        positions=batch.positions,
        segments=batch.segments,
    )
    print(
        f"{describe()}\nrows of {args.length}, {args.batch_size} a step, {args.threads} threads, "
        f"{rows.fill:.1%} filled\n"
    )
    print(
        "| model | xinslm tokens/s | Trainer tokens/s | ratio (min-max) | xinslm MiB | Trainer "
        "MiB |\n|---|---|---|---|---|---|"
    )
    for preset in args.presets:
        model = args.work / f"model-{preset}"
        if not model.is_dir():
            run_dir = args.work / f"run-{preset}"
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "xinslm",
                    "pretrain",
                    "--data-path",
                    str(args.dataset),
                    "--output-dir",
                    str(run_dir),
                    "--preset",
                    preset,
                    "--max-seq-length",
                    str(args.length),
                    "--batch-size",
                    "1",
                    "--max-steps",
                    "1",
                    "--max-eval-samples",
                    "1",
                ],
                check=True,
                capture_output=True,
            )
            (run_dir / "checkpoints" / "best").resolve().rename(model)
        ours = [
            sys.executable,
            "-c",
            OURS,
            str(model),
            str(args.dataset),
            str(args.length),
            str(args.batch_size),
            str(args.steps),
            str(args.threads),
        ]
        peer = [
            args.peer_python,
            str(Path(__file__).parent / "peers" / "hf_trainer.py"),
            "--model",
            str(model),
            "--rows",
            str(args.work / "rows.npz"),
            "--steps",
            str(args.steps),
            "--batch-size",
            str(args.batch_size),
            "--threads",
            str(args.threads),
        ]
        results: dict[str, list[dict]] = {"ours": [], "peer": []}
        for number in range(args.rounds):
            for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                results[side].append(run(ours if side == "ours" else peer))
        a, b = results["ours"], results["peer"]
        difference = abs(a[0]["first_loss"] - b[0]["first_loss"])
        if difference > 1e-4:
            sys.exit(
                f"the losses differ before training: {a[0]['first_loss']} and {b[0]['first_loss']}"
            )
        ratios = [
            x["tokens_per_second"] / y["tokens_per_second"] for x, y in zip(a, b, strict=True)
        ]
        middle = {
            k: [statistics.median(r[k] for r in side) for side in (a, b)]
            for k in ("tokens_per_second", "peak_mib")
        }
        print(
            f"| {preset} (loss equal to {difference:.0e}) | {middle['tokens_per_second'][0]:,.0f} "
            "| "
            f"{middle['tokens_per_second'][1]:,.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | "
            f"{middle['peak_mib'][0]:,.0f} | {middle['peak_mib'][1]:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
