"""What the codes of a run follow from, and whether the disk has room for them.

A stopped run continues only with the same plan (`stopped.py`). Threads are not part of it: another
number of them rounds otherwise.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from xinslm import __version__
from xinslm.data.dataset import open_dataset
from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_json
from xinslm.model.config import ModelConfig
from xinslm.model.source import ModelSource
from xinslm.quantize.activations import needs_original, working_bytes
from xinslm.quantize.calibration import RowShape
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.pipeline import Quantization
from xinslm.tokenizer.chat import end_ids

_LENGTH = 512
"""Tokens of a calibration row of models with a longer context."""


def row_shape(config: QuantizeConfig, model: ModelConfig) -> RowShape:
    """Number and length of the calibration rows; UsageError if the model cannot read as many
    tokens.
    """
    length = config.max_seq_length or min(model.max_position_embeddings, _LENGTH)
    if length > model.max_position_embeddings:
        raise UsageError(
            f"--max-seq-length is {length}, but the model reads at most "
            f"{model.max_position_embeddings}"
        )
    return RowShape(config.num_calibration_samples, length)


def make_plan(
    config: QuantizeConfig, source: ModelSource, tokenizer: Any, shape: RowShape
) -> dict[str, Any]:
    """All that the codes of a calibrated run follow from, by the names of the settings."""
    if config.self_generate:
        dataset: str | dict[str, str] = {
            "chat_template": sha256_json(tokenizer.chat_template),
            "control_tokens": sha256_json([list(tokenizer.start_ids), sorted(end_ids(tokenizer))]),
        }
    else:
        assert config.data_path is not None, "QuantizeConfig.check sees to it"
        dataset = open_dataset(config.data_path).fingerprint
    return {
        "program": f"xinslm {__version__} with torch {torch.__version__}",
        "model": source.fingerprint,
        "tokenizer": tokenizer.fingerprint(),
        "dataset": dataset,
        "bits": config.bits,
        "method": config.method,
        "num_calibration_samples": shape.rows,
        "max_seq_length": shape.length,
        "seed": config.seed,
    }


def require_disk(folder: Path, work: Quantization) -> None:
    """Raise XinslmError if what is still to be written does not fit on the disk of `folder`: the
    final file and, if layers are to be computed, their codes and the activations.
    """
    codes = work.model.num_parameters * 5 // 8
    needed, found, remedy = codes, 0, "free some"
    if len(work.found.layers) < work.model.num_hidden_layers:
        with_original = needs_original(work.method, work.model, work.batches)
        needed += codes + working_bytes(work.model, work.batches, with_original)
        found = sum(file.stat().st_size for file in folder.iterdir())
        remedy = "free some, choose another --output-dir, or take fewer --num-calibration-samples"
    free = shutil.disk_usage(folder).free
    if needed > found + free:
        raise XinslmError(
            f"quantizing needs {needed / 1e6:,.0f} MB on the disk of {folder.parent} for the time "
            f"being, but {(found + free) / 1e6:,.0f} MB are free: {remedy}"
        )
