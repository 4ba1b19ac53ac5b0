"""How much of the gain of full distillation a sparse cache keeps: real teacher, real text, equal
tokens, paired seeds.

    python benchmarks/quality_of_cache.py --data ../shared/data --work /tmp/core

Teacher stories5M, student of 1.4M parameters. For each seed every variant starts from the same
weights and sees the same rows; only the teacher targets differ: none (cross-entropy), the whole
distribution (live), the cache at several sizes, and the peers' scheme (the k largest probabilities,
renormalised, against the student's whole softmax). The share is (CE - variant) / (CE - full) of the
validation loss. Finished runs are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import describe
from sides import keep, xinslm

from xinslm.cache.folder import Cache
from xinslm.cache.kinds import CachedTargets
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import Batch, PackedDataset
from xinslm.distill.target_sources import LiveTargets
from xinslm.losses.config import LossConfig
from xinslm.losses.targets import DenseTargets
from xinslm.model.files import open_model
from xinslm.model.transformer import Transformer
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train.config import PretrainConfig
from xinslm.train.inputs import shape
from xinslm.train.packed import packed_trainer
from xinslm.train.row_sampler import Source

CACHES = {
    "lean": (4, 0.04),
    "default": (4, 0.02),
    "rich": (8, 0.01),
    "11 and no tail samples": (11, 0),
}
"""Top-k tokens, and the mass that a tail sample stands for."""
TOP = (12, 128)
VARIANTS = ["CE", "full", *CACHES, *(f"top-{k} renormalised" for k in TOP)]


class TopK(LiveTargets):
    """The peers' scheme: everything outside the k largest logits is dropped and the rest
    renormalised.
    """

    def __init__(self, teacher: HuggingFaceTeacher, k: int) -> None:
        super().__init__(teacher)
        self.k = k

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> DenseTargets:
        """Dense targets whose small logits are gone."""
        whole = super().targets(batch, chosen, device)

        def logits(rows: slice) -> torch.Tensor:
            full = whole.logits(rows)
            least = full.topk(self.k, dim=1).values[:, -1:]
            return full.masked_fill(full < least, -1e30)

        return DenseTargets(logits)


def one(args: argparse.Namespace, variant: str, seed: int) -> None:
    """Train one student and store its validation loss."""
    torch.set_num_threads(1)
    data, teacher_folder = args.work / f"stories-{args.tokens}", args.data / "models" / "stories5M"
    config = PretrainConfig(
        max_eval_samples=0,
        data_path=data,
        output_dir=Path("unused"),
        max_seq_length=256,
        batch_size=8,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        seed=seed,
        optimizer=args.optimizer,
    )
    dataset = open_dataset(data)
    rows = PackedDataset(dataset.split("train"), 256)
    loss, source = LossConfig(args.alpha, 1 - args.alpha), None
    if variant == "CE":
        loss = LossConfig(1.0, 0.0)
    elif variant in CACHES:
        if not CACHES[variant][1]:
            loss = replace(loss, tail_weight=0.0)
        source = CachedTargets(
            Cache(args.work / f"cache-{variant}".replace(" ", "-")).split("train")
        )
    else:
        teacher = HuggingFaceTeacher(open_model(teacher_folder))
        source = (
            LiveTargets(teacher)
            if variant == "full"
            else TopK(teacher, int(variant.split("-")[1].split()[0]))
        )
    model = Transformer(shape(config, load_tokenizer(data / "tokenizer")))
    model.initialise(torch.Generator().manual_seed(seed))
    held_out = PackedDataset(dataset.split("validation"), 256)
    trainer = packed_trainer(
        model, config, Source(rows, source, loss), args.steps, (held_out, None)
    )
    tokens = sum(trainer.step(number).tokens for number in range(args.steps))
    value = trainer.validate().ce
    print(json.dumps({"validation": value, "tokens": tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=450_000, help="tokens of text to train on")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args, args.one[0], int(args.one[1]))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    teacher, data = args.data / "models" / "stories5M", args.work / f"stories-{args.tokens}"
    if not data.is_dir():
        xinslm(
            f"prepare --data-path {args.data}/text/stories_train.jsonl.gz "
            f"--validation-path {args.data}/text/stories_valid.jsonl.gz --tokenizer-path "
            f"{teacher} --output-dir {data} "
            f"--max-tokens {args.tokens}"
        )
    entry_bytes = {}
    for name, (top_k, sample_mass) in CACHES.items():
        if name not in args.variants:
            continue
        folder = args.work / f"cache-{name}".replace(" ", "-")
        if not (folder / "manifest.json").is_file():
            xinslm(
                f"cache {teacher} --data-path {data} --output-dir {folder} --max-seq-length 256 "
                f"--top-k {top_k} --tail-sample-mass {sample_mass}"
            )
        entry_bytes[name] = round(Cache(folder).entry_bytes / Cache(folder).positions, 1)
    results_file = (
        args.work / f"quality-{args.optimizer}-{args.steps}-{args.learning_rate}-{args.alpha}.json"
    )
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    jobs = [(v, s) for s in range(args.seeds) for v in args.variants if f"{v}/{s}" not in results]
    running: list[tuple[str, subprocess.Popen]] = []
    while jobs or running:
        while jobs and len(running) < args.jobs:
            variant, seed = jobs.pop(0)
            process = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--one", variant, str(seed)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            running.append((f"{variant}/{seed}", process))
        key, process = running.pop(0)
        out = process.communicate()[0]
        if process.returncode:
            sys.exit(f"{key} failed")
        results[key] = json.loads(out.strip().splitlines()[-1])
        results_file.write_text(json.dumps(results, indent=1))
        print(f"{key}: {results[key]['validation']:.4f}", flush=True)
    print(
        f"\n{describe()}\n{args.steps} steps of 8 x 256, {results['CE/0']['tokens']:,} tokens, "
        f"{args.optimizer}\n"
    )
    print(
        "| teacher targets | bytes a position | validation nats | share of the gain, seed by seed "
        "| mean share |\n|---|---|---|---|---|"
    )
    table = {}
    for variant in args.variants:
        losses = [results[f"{variant}/{s}"]["validation"] for s in range(args.seeds)]
        ce = [results[f"CE/{s}"]["validation"] for s in range(args.seeds)]
        full = [results[f"full/{s}"]["validation"] for s in range(args.seeds)]
        shares = [(c - v) / (c - f) for c, v, f in zip(ce, losses, full, strict=True)]
        total = sum(c - v for c, v in zip(ce, losses, strict=True)) / sum(
            c - f for c, f in zip(ce, full, strict=True)
        )
        spread = statistics.stdev(losses) if args.seeds > 1 else 0.0
        print(
            f"| {variant} | {entry_bytes.get(variant, '-')} | {statistics.mean(losses):.4f} ± "
            f"{spread:.4f} | "
            f"{', '.join(f'{x:.0%}' for x in shares)} | {total:.1%} |"
        )
        table[variant] = {"losses": losses, "shares": shares, "share": total}
    keep(args.work, "share of the gain of full distillation", table)
    keep(args.work, "cache bytes a position", entry_bytes)


if __name__ == "__main__":
    main()
