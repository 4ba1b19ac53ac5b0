"""What quantization costs a model, and what each part of GPTQ brings, in the same bytes.

    python benchmarks/quantization.py --model MODEL --data DATASET [OTHER ...] > quantization.jsonl

Each variant quantizes MODEL with rows of the first DATASET's train split and is measured on the
validation split of each against the unquantized model: KL divergence a token (nats), how often the
most likely token is the same, bits per byte. The unquantized model is its own first row; its KL is
exactly 0, which checks the measuring. One JSON line a variant and dataset; the seeds of a calibrated
variant choose other calibration rows.

Palettes are those of the Core ML export for the Neural Engine: 16 float16 numbers for 16 or 32 rows
of a matrix, 4.03 or 4.01 bits a weight with 576 columns; their embedding is a palette of 8 bits.
Q4_K is that of `export gguf --outtype q4_k`, with Q5_0 for rows that are no multiple of 256.

Rows of llama.cpp come from its own quantizer (`ggml_quantize_chunk` in the library of xllamacpp),
with the importance matrix that llama-imatrix computes: mean squares of the unquantized model's
activations, here over the same calibration rows. Their embedding is ours, at 8 bits.

Rows of GPTQModel and AutoRound run with `--peer gptqmodel=PYTHON autoround=PYTHON`, each PYTHON
that of the environment which its script in peers/ describes. They get the tokens of the same
calibration rows; their embedding is ours too.
"""

import argparse
import contextlib
import ctypes
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
import xllamacpp
from peer_quantizers import WORKERS, by_peer
from torch import Tensor

from xinslm.data.dataset import open_dataset
from xinslm.data.packing import Batch, PackedDataset
from xinslm.export.calibrated import fit_body
from xinslm.export.coreml.fit import fit_palettes
from xinslm.model import grids
from xinslm.model.files import open_model
from xinslm.model.grids import Q4_0, Q8_0, decode, encode, fit_scales
from xinslm.model.quantized import QuantizedSource
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.model.transformer import Transformer
from xinslm.progress import ignore
from xinslm.quantize import gptq
from xinslm.quantize.calibration import read_rows
from xinslm.quantize.pipeline import Quantization
from xinslm.quantize.refine import rewrite
from xinslm.quantize.run import write_folder
from xinslm.quantize.scale_distillation import distill_scales
from xinslm.tokenizer.load import load_tokenizer

ROWS_A_BATCH = 4


@dataclass(frozen=True)
class Variant:
    """One way to quantize."""

    name: str
    method: str
    """gptaq, gptq, rtn, absmax; kmeans or palette (k-means with error feedback); q4_k_rtn or q4_k
    (with error feedback); gptqmodel or autoround; or llama.cpp's name of a type.
    """
    bits: int = 4
    off: tuple[str, ...] = ()
    """Steps that are switched off."""
    scale_steps: int = 0
    has_importance: bool = False
    """Of llama.cpp: whether it gets the importance matrix."""
    group_size: int = 16
    """Of palettes: rows that share a table."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of GPTQModel and AutoRound: what differs from their defaults."""

    @property
    def calibrates(self) -> bool:
        """Whether it reads calibration rows."""
        return self.method in ("gptaq", "gptq", "palette", "q4_k", *WORKERS) or self.has_importance


GPTAQ, MSE = {"gptaq": True}, {"mse": 2.4}
ACT_ORDER = {"desc_act": True, "static_groups": True}
"""Settings of GPTQModel. Its own default order keeps groups together (`act_group_aware`); act-order
needs groups that are fixed before, or each group's columns would lie apart.
"""
VARIANTS = [
    Variant("Q8_0", "rtn", 8),
    Variant("Q4_0, nearest, largest weight / -8 (llama.cpp's rule)", "absmax"),
    Variant("Q4_0, nearest, searched scales", "rtn"),
    Variant("llama.cpp Q4_0", "Q4_0"),
    Variant("llama.cpp Q4_0, importance matrix", "Q4_0", has_importance=True),
    Variant("llama.cpp IQ4_NL, importance matrix", "IQ4_NL", has_importance=True),
    Variant("llama.cpp Q4_K", "Q4_K"),
    Variant("llama.cpp Q4_K, importance matrix", "Q4_K", has_importance=True),
    Variant("GPTQ, largest weight / -8", "gptq", off=("search", "act_order")),
    Variant("GPTQ, largest weight / -8, act-order", "gptq", off=("search",)),
    Variant("GPTQ, searched scales", "gptq", off=("act_order",)),
    Variant("GPTQ, searched scales, act-order", "gptq"),
    Variant("GPTAQ (the default)", "gptaq"),
    Variant("GPTAQ, 100 scale steps", "gptaq", scale_steps=100),
    Variant("Q4_K, nearest (export gguf --outtype q4_k)", "q4_k_rtn"),
    Variant("GPTAQ on Q4_K (the same with --data-path)", "q4_k"),
    Variant("palettes of 16 rows, k-means", "kmeans"),
    Variant("palettes of 16 rows, k-means and GPTAQ", "palette"),
    Variant("palettes of 32 rows, k-means and GPTAQ", "palette", group_size=32),
    Variant("GPTQModel (its default)", "gptqmodel"),
    Variant("GPTQModel, mse", "gptqmodel", settings=MSE),
    Variant("GPTQModel, mse, act-order", "gptqmodel", settings=MSE | ACT_ORDER),
    Variant("GPTQModel, its GPTAQ", "gptqmodel", settings=GPTAQ),
    Variant("GPTQModel, its GPTAQ, mse, act-order", "gptqmodel", settings=GPTAQ | MSE | ACT_ORDER),
    Variant("AutoRound (its default)", "autoround"),
    Variant("AutoRound, batches of 4", "autoround", settings={"batch_size": 4}),
]


def _half(scales: Tensor) -> Tensor:
    """`storable` with the 11 significant bits of float16."""
    rounded = scales.abs().clamp(grids.SMALLEST_SCALE, grids.LARGEST_SCALE).half().float()
    return torch.where(scales < 0, -rounded, rounded)


def _largest_over_eight(blocks: Tensor, weights: Tensor, grid: grids.Grid) -> Tensor:
    """`search_scales` without a search."""
    position = blocks.abs().argmax(dim=1, keepdim=True)
    return grids.storable(blocks.gather(1, position) / grid.lowest).expand(-1, weights.shape[1], -1)


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
    options = _options()
    source = open_model(options.model)
    length = min(source.config.max_position_embeddings, 512)
    held_out = {str(folder): _held_out(folder, length, options.rows) for folder in options.data}
    fingerprint = load_tokenizer(options.model).fingerprint()
    original = source.transformer()
    report(original, original, held_out, {"variant": "not quantized", "model": source.path.name})
    report_scale_precision(original)
    for variant in VARIANTS:
        if not any(text in variant.name for text in options.only):
            continue
        if variant.method in WORKERS and variant.method not in options.peer:
            continue
        for seed in range(options.seeds if variant.name.startswith("GPTAQ") else 1):
            calibration: list[Batch] = []
            if variant.calibrates:
                count = options.num_calibration_samples
                calibration, _ = read_rows(
                    options.data[0], fingerprint, source.config, count, length, seed
                )
            start = time.perf_counter()
            model, size = quantize(variant, options.model, calibration, options.peer)
            facts = {
                "variant": variant.name,
                "seed": seed,
                "num_calibration_samples": len(calibration) and options.num_calibration_samples,
                "linear_bytes": size,
                "quantize_seconds": round(time.perf_counter() - start, 1),
            }
            report(original, model, held_out, facts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder, not quantized")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        nargs="+",
        help="dataset folders made with the model's tokenizer; the first calibrates",
    )
    parser.add_argument("--num-calibration-samples", type=int, default=128)
    parser.add_argument("--rows", type=int, default=0, help="validation rows to use; 0 for all")
    parser.add_argument(
        "--seeds", type=int, default=3, help="draws of calibration rows for GPTAQ's variants"
    )
    parser.add_argument(
        "--only", default=[""], nargs="+", help="measure variants whose name holds one of these"
    )
    parser.add_argument(
        "--peer",
        default=[],
        nargs="+",
        metavar="NAME=PYTHON",
        help=f"interpreters of the peers' environments; NAME is {' or '.join(WORKERS)}",
    )
    options = parser.parse_args()
    options.peer = dict(entry.split("=", 1) for entry in options.peer)
    return options


@dataclass(frozen=True)
class HeldOut:
    """Validation rows of one dataset."""

    batches: list[Batch]
    num_bytes: int | None
    """Of text, if all rows are used."""


def _held_out(folder: Path, length: int, limit: int) -> HeldOut:
    split = open_dataset(folder).split("validation")
    rows = PackedDataset(split, length)
    count = min(limit or len(rows), len(rows))
    batches = [
        rows.batch(np.arange(i, min(i + ROWS_A_BATCH, count)))
        for i in range(0, count, ROWS_A_BATCH)
    ]
    return HeldOut(batches, int(split.document_bytes.sum()) if count == len(rows) else None)


def quantize(
    variant: Variant, folder: Path, calibration: list[Batch], pythons: dict[str, str]
) -> tuple[Transformer, int]:
    """The dequantized model of a variant, and the bytes of its linear layers."""
    source = open_model(folder)
    if variant.method in WORKERS:
        model, python = source.transformer(), pythons[variant.method]
        size = by_peer(variant.method, python, variant.settings, folder, model, calibration)
        _round_table(model)
        return model, size
    if variant.method in ("Q4_0", "IQ4_NL", "Q4_K"):
        return by_llama_cpp(variant, source.transformer(), calibration)
    if variant.method in ("kmeans", "palette"):
        return with_palettes(variant, source, calibration)
    if variant.method in ("q4_k_rtn", "q4_k"):
        return with_block_types(source, calibration)
    with tempfile.TemporaryDirectory() as name, without(*variant.off):
        path = Path(name)
        rows = calibration if variant.calibrates else []
        work = Quantization(source, variant.bits, rows, method=variant.method)
        write_folder(work, load_tokenizer(folder), path, {}, {}, "benchmark")
        quantized = QuantizedSource(name, path)
        if variant.scale_steps:
            tuned = distill_scales(source, quantized, calibration, variant.scale_steps)
            print(json.dumps({"kl_of_its_own_check": [tuned.before, tuned.after]}), flush=True)
            stored = {
                stem: replace(quantized.stored(f"{stem}.weight"), scales=scales)
                for stem, scales in tuned.scales.items()
            }
            rewrite(quantized, stored, {})
            quantized = QuantizedSource(name, path)
        weights = [quantized.stored(n) for n in quantized.names if n.endswith("_proj.weight")]
        size = sum(w.data.nbytes + (0 if w.scales is None else w.scales.nbytes) for w in weights)
        return quantized.transformer(), size


@torch.no_grad()
def with_palettes(
    variant: Variant, source: ModelSource, calibration: list[Batch]
) -> tuple[Transformer, int]:
    """What the Core ML export for the Neural Engine holds."""
    shapes = weight_shapes(source.config)
    found = fit_palettes(source, shapes, variant.group_size, calibration, ignore)
    model, size = source.transformer(), 0
    for name, palette in found.items():
        model.get_parameter(name).copy_(palette.decode())
        if name.endswith("_proj.weight"):
            size += palette.indices.numel() // 2 + palette.tables.nbytes
    return model, size


@torch.no_grad()
def with_block_types(source: ModelSource, calibration: list[Batch]) -> tuple[Transformer, int]:
    """What `export gguf --outtype q4_k` holds; without rows, rounded to nearest."""
    body = fit_body(source, weight_shapes(source.config), "q8_0", calibration, ignore)
    model = source.transformer()
    for name, coded in body.coded.items():
        model.get_parameter(name).copy_(coded.decode())
    _round_table(model)
    return model, sum(coded.pack().nbytes for coded in body.coded.values())


def by_llama_cpp(
    variant: Variant, model: Transformer, calibration: list[Batch]
) -> tuple[Transformer, int]:
    """Round the linear layers in place by ggml; rows that are no multiple of a type's block get
    IQ4_NL, as llama-quantize does for Q4_K.
    """
    squares = _mean_squares(model, calibration)
    size = 0
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        weight = module.weight.detach().numpy()
        kind = gguf.GGMLQuantizationType[variant.method]
        if weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.IQ4_NL
        blocks = _ggml_quantize(weight, kind, squares.get(name))
        size += blocks.nbytes
        values = gguf.quants.dequantize(blocks, kind)
        module.weight.data = torch.from_numpy(values)
    _round_table(model)
    return model, size


def _round_table(model: Transformer) -> None:
    """Round the embedding to Q8_0 in place."""
    table = model.model.embed_tokens.weight
    scales = fit_scales(table.detach(), Q8_0)
    table.data = decode(encode(table.detach(), scales, Q8_0), scales)


@torch.no_grad()
def _mean_squares(model: Transformer, calibration: list[Batch]) -> dict[str, np.ndarray]:
    sums: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: sums.__setitem__(
                name, sums.get(name, 0) + inputs[0].flatten(0, 1).square().sum(0)
            )
        )
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    tokens = 0
    for batch in calibration:
        _logprobs(model, batch)
        tokens += batch.input_ids.size
    for handle in handles:
        handle.remove()
    return {name: (total / tokens).numpy() for name, total in sums.items()}


def _ggml_quantize(weight: np.ndarray, kind: Any, importance: np.ndarray | None) -> np.ndarray:
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    floats = ctypes.POINTER(ctypes.c_float)
    rows, columns = weight.shape
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((rows, columns // block * block_bytes), np.uint8)
    source = np.ascontiguousarray(weight, np.float32)
    matrix = None if importance is None else importance.astype(np.float32).ctypes.data_as(floats)
    written = library.ggml_quantize_chunk(
        ctypes.c_int(int(kind)),
        source.ctypes.data_as(floats),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        matrix,
    )
    assert written == out.nbytes
    return out


@torch.no_grad()
def report(
    original: Transformer,
    model: Transformer,
    held_out: dict[str, HeldOut],
    facts: dict[str, Any],
) -> None:
    """Print a JSON line for each dataset: divergence and bits per byte of `model`."""
    for name, rows in held_out.items():
        _report(original, model, rows, facts | {"data": Path(name).name})


def _report(
    original: Transformer, model: Transformer, rows: HeldOut, facts: dict[str, Any]
) -> None:
    batches, num_bytes = rows.batches, rows.num_bytes
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
                "bits_per_byte": num_bytes and totals["nats"] / math.log(2) / num_bytes,
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
