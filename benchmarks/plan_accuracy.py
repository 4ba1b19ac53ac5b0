"""`xinslm plan` against measured peaks: real optimiser steps, each configuration in a process of
its own.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --only "10m 8x512" "1m 32x256"

Measured is the kernel's high-water mark of resident memory (VmHWM) after two steps, less what the
process held when everything was imported and nothing built but a weight of 64 x 64 and its
optimiser; planned is the formula's peak without its constant for the interpreter.
"""

import argparse
import json
import subprocess
import sys

from machine import describe

from xinslm.model.config import PRESETS, ModelConfig
from xinslm.plan.memory import step_memory
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
    "135m 2x512 bfloat16": {
        "preset": "135m",
        "batch_size": 2,
        "max_seq_length": 512,
        "param_dtype": "bfloat16",
        "gradient_checkpointing": True,
    },
}
STEPS = """
import json, sys
from pathlib import Path
import numpy as np, torch
from xinslm.data.dataset import Split
from xinslm.data.packing import PackedDataset
from xinslm.device import return_freed_memory
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

settings, vocabulary = json.loads(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
idle = torch.nn.Parameter(torch.randn(64, 64))
(idle @ torch.randn(64, 64)).sum().backward()
torch.randn(512, 1024) @ torch.randn(1024, 1024)  # the library of products takes its buffers
torch.optim.AdamW([idle], fused=True).step()  # the first optimiser of a process imports much
before = resident("VmRSS")
config = PretrainConfig(data_path=Path("d"), output_dir=Path("o"), **settings)
if config.gradient_checkpointing:
    return_freed_memory()  # as the stage does
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
model.compute_dtype = getattr(torch, config.compute_dtype)
trainer = packed_trainer(model, config, Source(PackedDataset(split, length), None, LossConfig(1.0, 0.0)), 2)
for number in range(2):
    trainer.step(number)
print(json.dumps([before, resident("VmHWM")]))
"""


def with_dtype(settings: dict) -> dict:
    """The settings, with the type of products that they name or float32."""
    return {"compute_dtype": "float32", **settings}


def planned(settings: dict) -> int:
    """Bytes of the formula's peak."""
    config = PretrainConfig(data_path="d", output_dir="o", **with_dtype(settings))
    shape = ModelConfig(vocab_size=VOCABULARY, **vars(PRESETS[config.preset]))
    return step_memory(shape, config).peak


def measured(settings: dict) -> int:
    """Bytes above the idle process that two steps took at most."""
    command = [sys.executable, "-c", STEPS, json.dumps(with_dtype(settings)), str(VOCABULARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    before, peak = json.loads(done.stdout)
    return peak - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS)
    )
    args = parser.parse_args()
    print(
        f"{describe()}, vocabulary {VOCABULARY:,}\n\n| run | planned MiB | measured MiB | planned "
        "/ measured |\n|---|---|---|---|"
    )
    for name in args.only:
        settings = CONFIGURATIONS[name]
        ours, theirs = planned(settings) / 2**20, measured(settings) / 2**20
        print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
