"""`xinslm plan` against measured peaks and times: real optimiser steps, each configuration in a
process of its own.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --only "10m 8x512" "1m 32x256"
    python benchmarks/plan_accuracy.py --steps 6 --threads 2 --only "135m 4x512"

Measured is the kernel's high-water mark of resident memory (VmHWM) after two steps, less what the
process held when everything was imported and nothing built but a weight of 64 x 64 and its
optimiser; planned is the formula's peak without its constant for the interpreter. Planned seconds
of a step are what `plan` finds by timing one and two blocks, measured ones the median of the steps
after the first; they mean something if the machine is idle.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import torch
from machine import describe

from xinslm.model.config import PRESETS, ModelConfig
from xinslm.plan.measured import measure_speed
from xinslm.plan.memory import step_memory
from xinslm.plan.work import training_operations
from xinslm.precision import compute_dtype
from xinslm.train.config import PretrainConfig

VOCABULARY = 8192
CONFIGURATIONS: dict[str, dict] = {
    "10m 8x512": {"preset": "10m", "batch_size": 8, "max_seq_length": 512},
    "10m 2x256": {"preset": "10m", "batch_size": 2, "max_seq_length": 256},
    "10m 2x512": {"preset": "10m", "batch_size": 2, "max_seq_length": 512},
    "10m 8x512 in 4 parts": {
        "preset": "10m",
        "batch_size": 8,
        "micro_batch_size": 2,
        "max_seq_length": 512,
    },
    "10m 8x512 checkpointing": {
        "preset": "10m",
        "batch_size": 8,
        "max_seq_length": 512,
        "gradient_checkpointing": True,
    },
    "10m 8x512 bfloat16": {
        "preset": "10m",
        "batch_size": 8,
        "max_seq_length": 512,
        "compute_dtype": "bfloat16",
    },
    "135m 2x256 bfloat16": {
        "preset": "135m",
        "batch_size": 2,
        "max_seq_length": 256,
        "compute_dtype": "bfloat16",
    },
    "10m 4x256": {"preset": "10m", "batch_size": 4, "max_seq_length": 256},
    "10m 4x384 muon": {
        "preset": "10m",
        "batch_size": 4,
        "max_seq_length": 384,
        "optimizer": "muon",
    },
    "1m 8x512": {"preset": "1m", "batch_size": 8, "max_seq_length": 512},
    "1m 16x256 in 2 parts": {
        "preset": "1m",
        "batch_size": 16,
        "micro_batch_size": 8,
        "max_seq_length": 256,
    },
    "1m 32x256": {"preset": "1m", "batch_size": 32, "max_seq_length": 256},
    "135m 1x256": {"preset": "135m", "batch_size": 1, "max_seq_length": 256},
    "135m 1x256 adamw8bit": {
        "preset": "135m",
        "batch_size": 1,
        "max_seq_length": 256,
        "optimizer": "adamw8bit",
    },
    "135m 1x256 muon": {
        "preset": "135m",
        "batch_size": 1,
        "max_seq_length": 256,
        "optimizer": "muon",
    },
    "135m 2x384 step in backward": {
        "preset": "135m",
        "batch_size": 2,
        "max_seq_length": 384,
        "optimizer_in_backward": True,
    },
    "135m 1x256 all savings": {
        "preset": "135m",
        "batch_size": 1,
        "max_seq_length": 256,
        "optimizer": "adamw8bit",
        "param_dtype": "bfloat16",
        "optimizer_in_backward": True,
        "gradient_checkpointing": True,
    },
    "10m 4x512 auto": {
        "preset": "10m",
        "batch_size": 4,
        "max_seq_length": 512,
        "compute_dtype": "auto",
    },
    "135m 4x512": {"preset": "135m", "batch_size": 4, "max_seq_length": 512},
    "135m 4x512 auto": {
        "preset": "135m",
        "batch_size": 4,
        "max_seq_length": 512,
        "compute_dtype": "auto",
    },
    "135m 2x512 bfloat16": {
        "preset": "135m",
        "batch_size": 2,
        "max_seq_length": 512,
        "param_dtype": "bfloat16",
        "gradient_checkpointing": True,
    },
}
STEPS = """
import json, statistics, sys, time
from pathlib import Path
import numpy as np, torch
from xinslm.precision import compute_dtype, use_fast_float32
from xinslm.data.dataset import Split
from xinslm.data.packing import PackedDataset
from xinslm.heap import return_large_blocks
from xinslm.train import run as train
from xinslm.train.config import PretrainConfig
from xinslm.train.packed import packed_trainer
from xinslm.train.row_sampler import Source
from xinslm.losses.config import LossConfig
from xinslm.model.config import PRESETS, ModelConfig
from xinslm.model.transformer import Transformer
from xinslm.model.param_dtype import cast_matrices_to_bfloat16

def resident(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024

settings, (vocabulary, steps, threads) = json.loads(sys.argv[1]), map(int, sys.argv[2:])
torch.set_num_threads(threads)
use_fast_float32()
idle = torch.nn.Parameter(torch.randn(64, 64))
(idle @ torch.randn(64, 64)).sum().backward()
torch.randn(512, 1024) @ torch.randn(1024, 1024)  # the library of products takes its buffers
torch.optim.AdamW([idle], fused=True).step()  # the first optimiser of a process imports much
before = resident("VmRSS")
config = PretrainConfig(data_path=Path("d"), output_dir=Path("o"), **settings)
if config.gradient_checkpointing:
    return_large_blocks()  # as the stage does
length = config.max_seq_length
rng = np.random.default_rng(0)
documents = np.concatenate(([0], np.cumsum(rng.integers(length // 3, length, 4 * config.batch_size * 2 + 8))))
count = int(documents[-1])
split = Split(rng.integers(0, vocabulary, count).astype(np.uint16), np.ones(count, np.uint8), documents, documents[1:], vocabulary)
shape = ModelConfig(vocab_size=vocabulary, **vars(PRESETS[config.preset]), max_position_embeddings=length)
with torch.device("meta"):
    model = Transformer(shape, config.gradient_checkpointing)
model.to_empty(device="cpu")
from xinslm.model.transformer import rotary_frequencies
model.frequencies = rotary_frequencies(model.config)
model.initialise(torch.Generator().manual_seed(0))
if config.param_dtype == "bfloat16":
    cast_matrices_to_bfloat16(model)
model.compute_dtype = compute_dtype(config.compute_dtype, torch.device("cpu"))
trainer = packed_trainer(model, config, Source(PackedDataset(split, length), None, LossConfig(1.0, 0.0)), steps)
seconds = []
for number in range(steps):
    began = time.perf_counter()
    trainer.step(number)
    seconds.append(time.perf_counter() - began)
print(json.dumps([before, resident("VmHWM"), statistics.median(seconds[1:])]))
"""


def with_dtype(settings: dict) -> dict:
    """The settings, with the type of products that they name or float32."""
    return {"compute_dtype": "float32", **settings}


def inputs(settings: dict) -> tuple[ModelConfig, PretrainConfig]:
    """The shape and the configuration of a run."""
    config = PretrainConfig(data_path="d", output_dir="o", **with_dtype(settings))
    return ModelConfig(vocab_size=VOCABULARY, **vars(PRESETS[config.preset])), config


def planned(settings: dict) -> int:
    """Bytes of the formula's peak."""
    shape, config = inputs(settings)
    dtype = compute_dtype(config.compute_dtype, torch.device("cpu"))
    return step_memory(shape, replace(config, compute_dtype=str(dtype)[len("torch.") :])).peak


def planned_seconds(settings: dict) -> float:
    """Seconds of a step, by `plan`'s measurement in this process."""
    shape, config = inputs(settings)
    of_token = training_operations(shape, config)
    operations = of_token * config.batch_size * config.max_seq_length
    return operations / (measure_speed(shape, config).training * 1e12)


def measured(settings: dict, steps: int = 2, threads: int = 1) -> tuple[int, float]:
    """Bytes above the idle process that steps took at most, and seconds of a step."""
    numbers = map(str, (VOCABULARY, steps, threads))
    command = [sys.executable, "-c", STEPS, json.dumps(with_dtype(settings)), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    before, peak, seconds = json.loads(done.stdout)
    return peak - before, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS)
    )
    parser.add_argument("--steps", type=int, default=2, help="2 for memory, more for seconds")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{describe()}, {args.threads} threads, vocabulary {VOCABULARY:,}\n\n| run | planned MiB | "
        "measured MiB | ratio | planned s a step | measured | ratio |\n|---|---|---|---|---|---|---|"
    )
    for name in args.only:
        settings = CONFIGURATIONS[name]
        ours, guess = planned(settings) / 2**20, planned_seconds(settings)
        size, seconds = measured(settings, args.steps, args.threads)
        theirs = size / 2**20
        print(
            f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} | {guess:.2f} | "
            f"{seconds:.2f} | {guess / seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
