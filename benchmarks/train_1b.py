"""The 1B preset, all its parameters, rows of 2,048, from a cache: real optimiser steps within 12
GiB.

    OMP_NUM_THREADS=2 python benchmarks/train_1b.py --data ../shared/data --work /tmp/one_b

The text is the PEPs under LLaMA-2's 32,000 tokens. The teacher is a tiny LLaMA with random weights
made here: memory and time of the student's steps do not depend on who filled the cache, and nothing
is claimed about what it learns. The student runs by the command line in a process of its own;
printed are the kernel's high-water mark of its resident memory (start, checkpoint and everything
else included), what `xinslm plan` says, and loss and seconds of each step. A run that was stopped
continues.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from machine import describe

from xinslm.plan.config import PlanConfig
from xinslm.plan.run import run as plan

SAVINGS = {
    "optimizer": "adamw8bit",
    "param_dtype": "bfloat16",
    "optimizer_in_backward": True,
    "gradient_checkpointing": True,
}
SETTINGS = {
    "preset": "1b",
    "max_seq_length": 2048,
    "batch_size": 1,
    "learning_rate": 3e-4,
    **SAVINGS,
}


def xinslm(*words: str) -> None:
    """Run a command of the tool, unless the folder it makes is there."""
    if not (Path(words[-1]) / "manifest.json").is_file():
        subprocess.run([sys.executable, "-m", "xinslm", *words], check=True)


def make_teacher(folder: Path, tokenizer: Path) -> None:
    """A LLaMA of two layers with random weights and the student's tokenizer."""
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)


def train(work: Path, steps: int) -> float:
    """Train, or continue; return the peak of resident memory in GiB."""
    flags = [word for key, value in SETTINGS.items() for word in _flag(key, value)]
    command = [
        sys.executable,
        "-m",
        "xinslm",
        "distill",
        "--data-path",
        str(work / "data"),
        "--cache",
        str(work / "cache"),
        "-o",
        str(work / "run"),
        "--max-steps",
        str(steps),
        "--logging-steps",
        "1",
        "--save-steps",
        str(max(steps - 1, 1)),
        "--max-eval-samples",
        "1",
        *flags,
    ]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return usage.ru_maxrss / 2**20


def _flag(key: str, value: object) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    return [name] if value is True else [name, str(value)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    work = args.work
    tokenizer = work / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.data / "tokenizers" / "llama2_32k.model", tokenizer / "tokenizer.model")
    xinslm(
        "prepare",
        "--data-path",
        str(args.data / "text" / "peps.jsonl.gz"),
        "--tokenizer-path",
        str(tokenizer),
        "--max-tokens",
        "16000",
        "--validation-fraction",
        "0.1",
        "-o",
        str(work / "data"),
    )
    make_teacher(work / "teacher", tokenizer)
    xinslm(
        "cache",
        str(work / "teacher"),
        "--data-path",
        str(work / "data"),
        "--max-seq-length",
        "2048",
        "-o",
        str(work / "cache"),
    )
    expected = plan(PlanConfig(data_path=work / "data", max_steps=args.steps, **SETTINGS))
    print(
        f"{describe()}\n{os.environ.get('OMP_NUM_THREADS', 'all')} threads, {SETTINGS}\n",
        flush=True,
    )
    peak = train(work, args.steps)
    print("\n| step | loss | gradient norm | seconds |\n|---|---|---|---|")
    before = 0.0
    for line in map(json.loads, (work / "run" / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            print(
                f"| {line['step']} | {line['loss']:.4f} | {line['grad_norm']:.3f} | "
                f"{line['seconds'] - before:.0f} |"
            )
            before = line["seconds"]
    size = (
        sum(file.stat().st_size for file in (work / "run" / "checkpoints" / "last").iterdir())
        / 2**30
    )
    print(
        f"\n{expected.shape.num_parameters:,} parameters; peak {peak:.2f} GiB resident, planned "
        f"{expected.needed / 2**30:.2f} GiB; the checkpoint is {size:.2f} GiB"
    )
    print("within 12 GiB" if peak <= 12 else "NOT within 12 GiB")


if __name__ == "__main__":
    main()
