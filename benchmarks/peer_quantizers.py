"""Weights that other programs' quantizers make, for `quantization.py`: each runs in an interpreter
of its own (`peers/gptqmodel_worker.py`, `peers/autoround_worker.py`) and writes a GPTQ folder.

Only what lies exactly on our grid is taken: 4-bit codes, symmetric, in groups of 32 neighbours with
a float16 scale each, so that bytes are those of Q4_0.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import figures_of

from xinslm.data.packing import Batch
from xinslm.model.files import open_model
from xinslm.model.grids import Q4_0
from xinslm.model.packed_source import PackedSource
from xinslm.model.stored import StoredWeight
from xinslm.model.transformer import Transformer

WORKERS = {"gptqmodel": "gptqmodel_worker.py", "autoround": "autoround_worker.py"}


@torch.no_grad()
def by_peer(
    peer: str,
    python: str,
    settings: dict[str, Any],
    folder: Path,
    model: Transformer,
    calibration: list[Batch],
) -> int:
    """Replace the linear layers of `model`, read from `folder`, by the peer's; return their bytes.

    What the worker says of its run is printed.
    """
    size, threads = 0, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        rows, output = Path(name, "rows.npz"), Path(name, "quantized")
        np.savez(
            rows,
            input_ids=np.concatenate([batch.input_ids for batch in calibration]),
            segments=np.concatenate([batch.segments for batch in calibration]),
        )
        worker = Path(__file__).parent / "peers" / WORKERS[peer]
        command = [python, str(worker), "--model", str(folder), "--rows", str(rows)]
        command += ["--output", str(output), "--settings", json.dumps(settings)]
        print(json.dumps(figures_of(command, threads)), flush=True)
        found = dict(_weights(output))
        linear = {n for n, _ in model.named_parameters() if n.endswith("_proj.weight")}
        if found.keys() != linear:
            raise SystemExit(f"{peer} quantized other matrices: {found.keys() ^ linear}")
        for parameter, weight in found.items():
            model.get_parameter(parameter).copy_(weight.dequantize())
            size += weight.data.nbytes + weight.scales.nbytes
    return size


def _weights(output: Path) -> Iterator[tuple[str, StoredWeight]]:
    """Names and codes of the quantized weights of a folder."""
    source = open_model(next(output.rglob("config.json")).parent)
    assert isinstance(source, PackedSource)
    for stem in source.stems:
        weight = source.stored(f"{stem}.weight")
        if weight is None or weight.format != Q4_0.name:
            raise SystemExit(f"{stem} is not in symmetric 4-bit groups of 32 neighbours")
        yield f"{stem}.weight", weight
