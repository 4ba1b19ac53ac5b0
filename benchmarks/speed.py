"""Training steps and scoring of a real model in float32, in bfloat16 and with `auto`.

    python benchmarks/speed.py TEACHER STUDENT --data-path DATA

TEACHER and STUDENT are models (folders or GGUF files) with the tokenizer of DATA, a dataset folder.
Positions a second are medians over rounds in which the types take turns; utilisation is against the
measured peak of matrix products in the same type. The KL divergence is the mean from the teacher in
float32, over the positions whose next token is a target, which are those that a cache holds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from machine import describe

from xinslm.data.dataset import Split, open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.losses.config import LossConfig
from xinslm.model.files import load_model, open_model
from xinslm.model.operations import forward_operations, training_operations
from xinslm.precision import product_rate, use_fast_float32
from xinslm.teachers.own import OwnTeacher
from xinslm.train.config import PretrainConfig
from xinslm.train.packed import packed_trainer
from xinslm.train.row_sampler import Source

BATCH, LENGTH, LOGIT_ROWS = 4, 512, 170
NAMES = {"MKL": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


def choose(name: str) -> None:
    """Set the library of float32 products."""
    use_fast_float32()
    if name == "MKL":
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def peak(name: str, dtype: torch.dtype) -> float:
    """Operations a second of products in a type, with the library of that side."""
    choose(name)
    return product_rate.__wrapped__(dtype, "cpu")


def in_turn(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            choose(name)
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def training(student: Path, data: Path, rounds: int) -> list[str]:
    """Lines of the table for optimizer steps."""
    rows = PackedDataset(open_dataset(data).split("train"), LENGTH)
    sides, number = {}, iter(range(10_000))
    for name, dtype in NAMES.items():
        config = PretrainConfig(
            data_path=data,
            output_dir=data,
            batch_size=BATCH,
            max_seq_length=LENGTH,
            learning_rate=1e-5,
            compute_dtype="float32" if name == "MKL" else name,
        )
        model = load_model(student)
        model.compute_dtype = dtype
        trainer = packed_trainer(model, config, Source(rows, None, LossConfig(1.0, 0.0)), 10_000)
        sides[name] = lambda trainer=trainer: trainer.step(next(number))
    work = BATCH * LENGTH * training_operations(model.config, LENGTH)
    found = in_turn(sides, rounds)
    return [
        f"| train, {name} | {BATCH * LENGTH / seconds:,.0f} | {found['MKL'] / seconds:.2f} | "
        f"{work / seconds / peak(name, NAMES[name]):.0%} | |"
        for name, seconds in found.items()
    ]


def scoring(name: str, data: Path, rounds: int) -> list[str]:
    """Lines of the table for a teacher's distributions."""
    split = open_dataset(data).split("train")
    documents = split.documents[:25]
    texts = [
        np.asarray(split.tokens[a:b])[:LENGTH].astype(np.int64) for a, b in pairwise(documents)
    ]
    texts.sort(key=len)
    batches = [texts[at : at + 8] for at in range(0, len(texts), 8)]
    teachers = {
        dtype: OwnTeacher(open_model(name), dtype) for dtype in ("float32", "bfloat16", "auto")
    }
    teachers["MKL"] = teachers["float32"]

    def score(dtype: str) -> None:
        teacher = teachers[dtype]
        states = torch.cat([teacher.states(batch) for batch in batches])
        for at in range(0, len(states), LOGIT_ROWS):
            teacher.logits(states[at : at + LOGIT_ROWS]).log_softmax(1)

    found = in_turn({dtype: lambda dtype=dtype: score(dtype) for dtype in teachers}, rounds)
    count = sum(map(len, texts))
    work = count * sum(forward_operations(teachers["auto"].model.config, LENGTH))
    kl = divergences(teachers, split, LOGIT_ROWS)
    lines = []
    for dtype, seconds in found.items():
        lines.append(
            f"| score, {dtype} | {count / seconds:,.0f} | {found['MKL'] / seconds:.2f} | "
            f"{work / seconds / peak(dtype, NAMES.get(dtype, torch.bfloat16)):.0%} | {kl[dtype]:.1e} |"
        )
    return lines


def divergences(teachers: dict[str, OwnTeacher], split: Split, rows: int) -> dict[str, float]:
    """Mean KL divergence from MKL's float32 at the target positions of 24 documents."""
    total, count = dict.fromkeys(teachers, 0.0), 0
    for a, b in pairwise(split.documents[:25]):
        ids = np.asarray(split.tokens[a:b])[:LENGTH].astype(np.int64)
        targets = np.flatnonzero(split.mask[a + 1 : a + len(ids)])[:rows]
        logs = {}
        for dtype, teacher in teachers.items():
            choose(dtype)
            logs[dtype] = teacher.logits(teacher.states([ids])[targets]).log_softmax(1)
        exact = logs["MKL"]
        for dtype, log_q in logs.items():
            total[dtype] += (exact.exp() * (exact - log_q)).sum().item()
        count += len(targets)
    return {dtype: value / count for dtype, value in total.items()}


def main() -> None:
    """Print the table."""
    use_fast_float32()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student", type=Path)
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(describe())
    print("\n| work | positions/s | of MKL's | utilisation | KL from MKL's, nats |")
    print("|---|---|---|---|---|")
    print("\n".join(scoring(args.teacher, args.data_path, args.rounds)), flush=True)
    print("\n".join(training(args.student, args.data_path, args.rounds)))


if __name__ == "__main__":
    main()
