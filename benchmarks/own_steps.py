"""Our side of the comparisons: a few optimiser steps of the real training loop; prints one JSON
line.

    python benchmarks/own_steps.py --model DIR --data DATASET --cache CACHE --steps 8 --batch-size 4
    --length 511

With `--teacher` the loss of the first step against the live teacher, dense, is printed too, for
comparison with a peer.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from xinslm.cache.folder import Cache
from xinslm.cache.kinds import CachedTargets
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.device import pick_device
from xinslm.distill.target_sources import LiveTargets
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import fused_loss
from xinslm.model.files import load_model, open_model
from xinslm.precision import compute_dtype
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.train.config import PretrainConfig
from xinslm.train.packed import packed_trainer
from xinslm.train.row_sampler import Source


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--cache",
        nargs="*",
        type=Path,
        default=[],
        help="none: plain cross-entropy; several: in turn",
    )
    parser.add_argument("--teacher")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=511)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute-dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--both", action="store_true", help="time each step with the cache(s) and without, in turn"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = compute_dtype(args.compute_dtype, pick_device("cpu"))
    rows = PackedDataset(open_dataset(args.data).split("train"), args.length)
    figures: dict = {"fill": rows.fill}
    sources = []
    for folder in args.cache:
        entries = Cache(folder).split("train")
        assert entries is not None
        sources.append(CachedTargets(entries))
    if args.both or not sources:
        sources.append(None)
    if args.teacher:
        batch = rows.batch(np.arange(args.batch_size))
        chosen = np.flatnonzero(batch.labels.ravel() >= 0)
        model, teacher = load_model(args.model), HuggingFaceTeacher(open_model(args.teacher))
        with torch.no_grad():
            arrays = (
                torch.from_numpy(a) for a in (batch.input_ids, batch.positions, batch.segments)
            )
            hidden = model.hidden(*arrays).flatten(0, 1)[torch.from_numpy(chosen)]
            targets = LiveTargets(teacher).targets(batch, chosen, torch.device("cpu"))
            labels = torch.from_numpy(batch.labels.ravel()[chosen])
            figures["first_loss"] = fused_loss(
                hidden, model.head_weight, labels, targets, LossConfig(0.0, 1.0)
            )[0].item()
    config = PretrainConfig(
        data_path=args.data,
        output_dir=Path("unused"),
        max_seq_length=args.length,
        batch_size=args.batch_size,
        compute_dtype=args.compute_dtype,
    )
    trainers = []
    for source in sources:
        loss = LossConfig(0.1, 0.9) if source is not None else LossConfig(1.0, 0.0)
        model = load_model(args.model)
        model.compute_dtype = dtype
        trainers.append(packed_trainer(model, config, Source(rows, source, loss), args.steps))
    seconds: list[list[float]] = [[] for _ in trainers]
    tokens: list[int] = []
    for number in range(args.steps):
        turn = range(len(trainers)) if number % 2 == 0 else reversed(range(len(trainers)))
        for which in turn:
            began = time.perf_counter()
            step = trainers[which].step(number)
            seconds[which].append(time.perf_counter() - began)
        tokens.append(step.tokens)
    speeds = [n / s for n, s in zip(tokens[1:], seconds[0][1:], strict=True)]
    figures |= {
        "tokens_per_second": statistics.median(speeds),
        "overall": sum(tokens[1:]) / sum(seconds[0][1:]),
        "step_seconds": [statistics.median(each[1:]) for each in seconds],
        "to_last": [
            statistics.median(a / b for a, b in zip(each[1:], seconds[-1][1:], strict=True))
            for each in seconds
        ],
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
