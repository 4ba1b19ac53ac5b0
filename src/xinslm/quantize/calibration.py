"""Calibration text: packed rows of a dataset (`activations.py` passes them through the model).

rows = dataset_rows(Path("data"), tokenizer, config, RowShape(128, 512), seed=0)
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.data.dataset import open_dataset, require_tokenizer
from xinslm.data.packing import Batch, PackedDataset
from xinslm.data.text_ids import document_ids
from xinslm.errors import UsageError
from xinslm.model.config import ModelConfig

_TOKENS_A_BATCH = 2048


@dataclass(frozen=True)
class RowShape:
    """How much text calibrates."""

    rows: int
    """Number of packed rows."""
    length: int
    """Tokens of a row."""


@dataclass(frozen=True)
class CalibrationRows:
    """Rows that calibrate, and what the manifest says of them."""

    batches: list[Batch]
    facts: dict[str, Any]
    """How the rows were made."""
    texts: list[str] = field(default_factory=list)
    """Ids of the dataset's documents in the rows, which evaluations refuse; none for text that the
    model wrote.
    """
    dataset: str | None = None
    """Fingerprint of the dataset, if there is one."""
    notes: list[str] = field(default_factory=list)
    """What is wrong with the rows, a sentence each."""


def dataset_rows(
    data: Path, tokenizer: Any, config: ModelConfig, shape: RowShape, seed: int
) -> CalibrationRows:
    """Draw rows from a dataset made with the model's `tokenizer`; errors as in `read_rows`."""
    batches, fingerprint = read_rows(
        data, tokenizer.fingerprint(), config, shape.rows, shape.length, seed
    )
    count = sum(len(batch.input_ids) for batch in batches)
    facts = {"method": "dataset", "rows": count, "max_seq_length": shape.length, "seed": seed}
    notes = []
    if count < shape.rows:
        notes.append(
            f"{data} has only {count:,} rows of {shape.length} tokens to calibrate on, not "
            f"{shape.rows:,}: all of them were used, and more text would lose less"
        )
    texts = text_ids_of(data, batches, tokenizer)
    return CalibrationRows(batches, facts, texts, fingerprint, notes)


def read_rows(
    data: Path, tokenizer: str, config: ModelConfig, num_rows: int, length: int, seed: int
) -> tuple[list[Batch], str]:
    """Draw `num_rows` packed rows of `length` tokens, or take all where there are fewer, in batches
    of about 2,048 tokens.

    Returns the batches and the dataset's fingerprint. `tokenizer` is the fingerprint of the model's
    own; a dataset with another tokenizer or without any row is a UsageError.
    """
    dataset = open_dataset(data)
    require_tokenizer(dataset, tokenizer, "the model to quantize")
    rows = PackedDataset(dataset.split("train"), length)
    if not len(rows):
        raise UsageError(f"{data} has no row of {length} tokens to train on. Add text")
    if rows.split.vocab_size > config.vocab_size:
        raise UsageError(
            f"{data} has {rows.split.vocab_size:,} token ids, the model only {config.vocab_size:,}"
        )
    count = min(num_rows, len(rows))
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
    return in_batches(rows, chosen), dataset.fingerprint


def in_batches(rows: PackedDataset, chosen: np.ndarray) -> list[Batch]:
    """The rows with indices `chosen`, in batches of about 2,048 tokens."""
    step = max(_TOKENS_A_BATCH // rows.row_length, 1)
    return [rows.batch(chosen[i : i + step]) for i in range(0, len(chosen), step)]


def hash_rows(batches: list[Batch]) -> str:
    """Hash of all arrays of the rows, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in vars(batch).items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def text_ids_of(data: Path, batches: list[Batch], tokenizer: Any) -> list[str]:
    """Ids of the documents of the train split that are in the batches, whole or in part."""
    stream = np.concatenate([batch.stream[batch.stream >= 0] for batch in batches])
    special = list(tokenizer.special_tokens.values())
    return document_ids(open_dataset(data).split("train"), stream, special)
