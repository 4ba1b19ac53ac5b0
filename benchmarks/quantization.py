"""What quantization costs a model, and what each part of GPTQ brings, in the same bytes.

    python benchmarks/quantization.py --model MODEL --data DATASET > quantization.jsonl

Each variant quantizes MODEL with rows of DATASET's train split and is measured on the whole
validation split against the unquantized model: KL divergence a token (nats), how often the most
likely token is the same, bits per byte. The unquantized model is its own first row; its KL is
exactly 0, which checks the measuring. One JSON line a variant; the seeds of a calibrated variant
choose other calibration rows.
"""

import argparse
import contextlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from xinslm.data.dataset import open_dataset
from xinslm.data.packing import Batch, PackedDataset
from xinslm.model import grids
from xinslm.model.files import load_model, open_model
from xinslm.model.grids import Q4_0, decode, encode, fit_scales
from xinslm.model.transformer import Transformer
from xinslm.quantize import gptq
from xinslm.quantize.calibration import read_rows
from xinslm.quantize.pipeline import Quantization
from xinslm.quantize.run import write_folder
from xinslm.tokenizer.load import load_tokenizer

ROWS_A_BATCH = 4
VARIANTS: list[tuple[str, int, bool, tuple[str, ...]]] = [
    ("Q8_0", 8, False, ()),
    ("Q4_0, nearest, largest weight / -8 (llama.cpp's rule)", 4, False, ("search",)),
    ("Q4_0, nearest, searched scales", 4, False, ()),
    ("Q4_0, GPTQ, largest weight / -8", 4, True, ("search", "act_order")),
    ("Q4_0, GPTQ, largest weight / -8, act-order", 4, True, ("search",)),
    ("Q4_0, GPTQ, searched scales", 4, True, ("act_order",)),
    ("Q4_0, GPTQ, searched scales, act-order (the default)", 4, True, ()),
]
"""Name, bits, whether GPTQ calibrates, and the steps that are switched off."""


def _half(scales: Tensor) -> Tensor:
    """`storable` with the 11 significant bits of float16."""
    rounded = scales.abs().clamp(grids.SMALLEST_SCALE, grids.LARGEST_SCALE).half().float()
    return torch.where(scales < 0, -rounded, rounded)


def _largest_over_eight(blocks: Tensor, weights: Tensor) -> Tensor:
    """`search_scales` without a search."""
    position = blocks.abs().argmax(dim=1, keepdim=True)
    return grids.storable(blocks.gather(1, position) / -8).expand(-1, weights.shape[1], -1)


SWITCHED_OFF: dict[str, tuple[Any, str, Callable[..., Tensor]]] = {
    "search": (grids, "search_scales", _largest_over_eight),
    "act_order": (gptq, "rounding_order", lambda diagonal: torch.arange(len(diagonal))),
    "bf16_exact": (grids, "storable", _half),
}
"""What replaces a step of the product in a variant without it."""


@contextlib.contextmanager
def without(*steps: str) -> Iterator[None]:
    """Replace steps of the quantization by their trivial form."""
    with contextlib.ExitStack() as patches:
        for step in steps:
            patches.enter_context(mock.patch.object(*SWITCHED_OFF[step]))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder, not quantized")
    parser.add_argument(
        "--data", type=Path, required=True, help="dataset folder made with the model's tokenizer"
    )
    parser.add_argument("--num-calibration-samples", type=int, default=128)
    parser.add_argument(
        "--seeds", type=int, default=3, help="draws of calibration rows for the default variant"
    )
    parser.add_argument(
        "--only", default="", help="measure only variants whose name holds this text"
    )
    options = parser.parse_args()
    source = open_model(options.model)
    config = source.config
    length = min(config.max_position_embeddings, 512)
    split = open_dataset(options.data).split("validation")
    rows = PackedDataset(split, length)
    batches = [
        rows.batch(np.arange(i, min(i + ROWS_A_BATCH, len(rows))))
        for i in range(0, len(rows), ROWS_A_BATCH)
    ]
    num_bytes = int(split.document_bytes.sum())
    fingerprint = load_tokenizer(options.model).fingerprint()
    original = source.transformer()
    report(
        original,
        original,
        batches,
        num_bytes,
        {"variant": "not quantized", "model": source.path.name},
    )
    report_scale_precision(original)
    for name, bits, calibrates, off in VARIANTS:
        if options.only not in name:
            continue
        seeds = range(options.seeds if name.endswith("(the default)") else 1)
        for seed in seeds:
            calibration: list[Batch] = []
            if calibrates:
                calibration, _ = read_rows(
                    options.data, fingerprint, config, options.num_calibration_samples, length, seed
                )
            with tempfile.TemporaryDirectory() as folder, torch.no_grad(), without(*off):
                start = time.perf_counter()
                work = Quantization(source, bits, calibration)
                write_folder(work, load_tokenizer(options.model), Path(folder), {}, {}, "benchmark")
                seconds = time.perf_counter() - start
                facts = {
                    "variant": name,
                    "seed": seed,
                    "num_calibration_samples": len(calibration) and options.num_calibration_samples,
                }
                report(
                    original,
                    load_model(Path(folder)),
                    batches,
                    num_bytes,
                    facts | {"quantize_seconds": round(seconds, 1)},
                )


@torch.no_grad()
def report(
    original: Transformer,
    model: Transformer,
    batches: list[Batch],
    num_bytes: int,
    facts: dict[str, Any],
) -> None:
    """Print one JSON line: divergence and bits per byte of `model` over all validation rows."""
    totals = {"kl": 0.0, "same": 0.0, "nats": 0.0}
    tokens = targets = 0
    for batch in batches:
        labels = torch.from_numpy(batch.labels)
        keep = torch.from_numpy(batch.segments >= 0)
        p, q = _logprobs(original, batch)[keep], _logprobs(model, batch)[keep]
        totals["kl"] += float((p.exp() * (p - q)).sum(-1).double().sum())
        totals["same"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        wanted = labels[keep]
        counted = wanted >= 0
        totals["nats"] -= float(q[counted].gather(1, wanted[counted, None]).double().sum())
        tokens, targets = tokens + len(p), targets + int(counted.sum())
    print(
        json.dumps(
            facts
            | {
                "kl": totals["kl"] / tokens,
                "same_top": totals["same"] / tokens,
                "nats_per_token": totals["nats"] / targets,
                "bits_per_byte": totals["nats"] / math.log(2) / num_bytes,
                "tokens": tokens,
                "machine": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
            }
        ),
        flush=True,
    )


def _logprobs(model: Transformer, batch: Batch) -> Tensor:
    ids, positions, segments = (
        torch.from_numpy(a) for a in (batch.input_ids, batch.positions, batch.segments)
    )
    return model.logits(model.hidden(ids, positions, segments)).float().log_softmax(-1)


def report_scale_precision(model: Transformer) -> None:
    """Print the squared error of nearest rounding with scales of 11 and of 8 significant bits."""
    weights = [w.detach() for name, w in model.named_parameters() if name.endswith("_proj.weight")]
    weights = [w for w in weights if w.shape[1] % 32 == 0]

    bfloat16 = sum(map(_squared_error, weights))
    with without("bf16_exact"):
        float16 = sum(map(_squared_error, weights))
    print(json.dumps({"squared_error_of_8_bit_scales_over_11_bit": bfloat16 / float16}), flush=True)


def _squared_error(weight: Tensor) -> float:
    scales = fit_scales(weight, Q4_0)
    return float((weight - decode(encode(weight, scales, Q4_0), scales)).double().square().sum())


if __name__ == "__main__":
    main()
