"""What follows the codes: 8 bits for some weights (`--target-size`), trained scales
(`--scale-steps`). Each step rewrites the weights of the quantized folder and its manifest.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from xinslm.data.packing import Batch
from xinslm.errors import UsageError
from xinslm.files import write_manifest
from xinslm.model.grids import BLOCK, GRIDS, Q4_0, Q8_0
from xinslm.model.names import QUANTIZED_WEIGHTS
from xinslm.model.quantized import KIND, VERSION, QuantizedSource
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.model.stored import StoredWeight
from xinslm.progress import Listener
from xinslm.quantize.config import QuantizeConfig, parse_size
from xinslm.quantize.rows import single_rows
from xinslm.quantize.scale_distillation import HELD_OUT, distill_scales
from xinslm.quantize.sensitivity import Cost, choose_wide, measure_costs, replacements

_PLAIN_BYTES = {"f16": 2, "f32": 4}


def require_room(config: QuantizeConfig, source: ModelSource, batches: list[Batch]) -> None:
    """Raise UsageError for what would fail after the codes were chosen: a size below that of 4 bits
    in all matrices, too few rows to train scales on, no matrix with blocks.
    """
    shapes = weight_shapes(source.config)
    blocks = {n: s for n, s in shapes.items() if len(s) == 2 and s[1] % BLOCK == 0}
    wanted = "--target-size" if config.target_size is not None else "--scale-steps"
    is_asked = config.target_size is not None or config.scale_steps > 0
    if is_asked and not any(name.startswith("model.layers.") for name in blocks):
        raise UsageError(
            f"no linear layer of {source.name} has rows in blocks of {BLOCK}, so none gets codes: "
            f"leave out {wanted}"
        )
    if config.scale_steps and (count := len(single_rows(batches))) < HELD_OUT:
        raise UsageError(
            f"training scales needs at least {HELD_OUT} calibration rows, there are {count}: "
            "raise --num-calibration-samples, add text, or leave out --scale-steps"
        )
    if config.target_size is not None:
        budget = parse_size(config.target_size)
        assert budget is not None, "QuantizeConfig.check sees to it"
        plain = sum(4 * math.prod(s) for n, s in shapes.items() if len(s) == 1)
        plain += sum(2 * math.prod(s) for n, s in shapes.items() if len(s) == 2 and n not in blocks)
        costs = {name: Cost(math.prod(shape), 0.0) for name, shape in blocks.items()}
        choose_wide(costs, plain, budget)


def refine(
    config: QuantizeConfig,
    source: ModelSource,
    folder: Path,
    batches: list[Batch],
    on_progress: Listener,
) -> list[str]:
    """Apply what `config` asks for to a complete quantized folder; lines for the terminal."""
    lines = []
    if config.target_size is not None:
        budget = parse_size(config.target_size)
        assert budget is not None, "QuantizeConfig.check sees to it"
        lines.append(_fit_size(source, folder, batches, budget, config.seed, on_progress))
    if config.scale_steps:
        quantized = _open(folder)
        tuned = distill_scales(source, quantized, batches, config.scale_steps, on_progress)
        stored = {
            stem: replace(quantized.stored(f"{stem}.weight"), scales=scales)
            for stem, scales in tuned.scales.items()
        }
        facts = {
            "steps": config.scale_steps,
            "kl_before": tuned.before,
            "kl_after": tuned.after if stored else tuned.before,
            "tokens": tuned.tokens,
        }
        rewrite(quantized, stored, {"scale_distillation": facts})
        lines.append(
            f"scales KL to the original {tuned.before:.5f} -> {tuned.after:.5f} nats per token, on "
            f"{tuned.tokens:,} tokens that were not trained on"
            + ("" if stored else "; no gain, so the scales are as before")
        )
    return lines


def rewrite(
    quantized: QuantizedSource, changed: Mapping[str, StoredWeight], facts: Mapping[str, Any]
) -> None:
    """Replace weights, by name without '.weight', in a quantized folder; `facts` go into the
    manifest.
    """
    folder, formats = quantized.path, {}
    stems = [name.removesuffix("weight") for name in quantized.formats]
    names = [stem + end for stem in stems for end in ("codes", "scales")]
    partial = folder / f".{QUANTIZED_WEIGHTS}.part"
    with SafetensorsWriter(partial, names) as out:
        for name in quantized.formats:
            stem = name.removesuffix(".weight")
            weight = changed.get(stem) or quantized.stored(name)
            formats[stem] = weight.format
            if weight.scales is None:
                out.add(name, weight.data)
            else:
                out.add(f"{stem}.codes", weight.data)
                out.add(f"{stem}.scales", weight.scales)
    os.replace(partial, folder / QUANTIZED_WEIGHTS)
    made = {"kind", "version", "made_by", "config", "inputs", "files"}
    content = {key: value for key, value in quantized.manifest.items() if key not in made}
    layers = {
        stem: loss
        for stem, loss in quantized.manifest["layers"].items()
        if quantized.formats[f"{stem}.weight"] == formats[stem]
    }
    linears = [kind for stem, kind in formats.items() if stem.startswith("model.layers.")]
    bits = 4 if Q4_0.name in linears or Q8_0.name not in linears else 8
    content |= {"formats": formats, "layers": layers, "bits": bits, **facts}
    old = quantized.manifest
    write_manifest(folder, KIND, VERSION, old["config"], old["inputs"], **content)


def _open(folder: Path) -> QuantizedSource:
    return QuantizedSource(str(folder), folder)


def _fit_size(
    source: ModelSource,
    folder: Path,
    batches: list[Batch],
    budget: int,
    seed: int,
    on_progress: Listener,
) -> str:
    quantized = _open(folder)
    plain = [(name, kind) for name, kind in quantized.formats.items() if kind not in GRIDS]
    fixed = sum(math.prod(quantized.shape_of(name)) * _PLAIN_BYTES[kind] for name, kind in plain)
    costs = measure_costs(source, quantized, batches, seed, on_progress)
    wide = choose_wide(costs, fixed, budget)
    left = sum(cost.divergence for stem, cost in costs.items() if stem not in wide)
    everything = sum(cost.divergence for cost in costs.values())
    facts = {"target_bytes": budget, "kl_of_4_bits": {s: c.divergence for s, c in costs.items()}}
    rewrite(quantized, replacements(source, quantized, costs, wide), facts)
    return (
        f"bits   8 for {len(wide)} of {len(costs)} matrices; estimated KL {left:.5f} nats per "
        f"token, {everything:.5f} with 4 bits in all"
    )
