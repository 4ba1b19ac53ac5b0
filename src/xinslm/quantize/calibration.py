"""Calibration: packed rows of text and their activations, layer by layer.

Rows pass through layers that are already quantized, so that each layer is fitted to its actual
inputs (GPTQ's "true sequential" order). Padding never enters a Hessian, and documents do not attend
to each other.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from xinslm.data.dataset import open_dataset, require_tokenizer
from xinslm.data.packing import Batch, PackedDataset
from xinslm.data.text_ids import document_ids
from xinslm.errors import UsageError
from xinslm.model.config import ModelConfig
from xinslm.model.transformer import Block, Transformer
from xinslm.quantize.gptq import Hessian

_TOKENS_A_BATCH = 2048
_KEPT_BYTES = 512 * 2**20


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
    facts = {
        "method": "dataset",
        "rows": shape.rows,
        "max_seq_length": shape.length,
        "seed": seed,
    }
    return CalibrationRows(batches, facts, text_ids_of(data, batches, tokenizer), fingerprint)


def read_rows(
    data: Path, tokenizer: str, config: ModelConfig, num_rows: int, length: int, seed: int
) -> tuple[list[Batch], str]:
    """Draw `num_rows` packed rows of `length` tokens, in batches of about 2,048 tokens.

    Returns the batches and the dataset's fingerprint. `tokenizer` is the fingerprint of the model's
    own; a dataset with another tokenizer or with too few rows is a UsageError.
    """
    dataset = open_dataset(data)
    require_tokenizer(dataset, tokenizer, "the model to quantize")
    rows = PackedDataset(dataset.split("train"), length)
    if num_rows > len(rows):
        raise UsageError(
            f"{data} has {len(rows):,} rows of {length} tokens to train on, "
            f"{num_rows:,} are asked for. Set --num-calibration-samples to {len(rows):,} or less"
        )
    if rows.split.vocab_size > config.vocab_size:
        raise UsageError(
            f"{data} has {rows.split.vocab_size:,} token ids, the model only {config.vocab_size:,}"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), num_rows, replace=False))
    return in_batches(rows, chosen), dataset.fingerprint


def in_batches(rows: PackedDataset, chosen: np.ndarray) -> list[Batch]:
    """The rows with indices `chosen`, in batches of about 2,048 tokens."""
    step = max(_TOKENS_A_BATCH // rows.row_length, 1)
    return [rows.batch(chosen[i : i + step]) for i in range(0, len(chosen), step)]


def text_ids_of(data: Path, batches: list[Batch], tokenizer: Any) -> list[str]:
    """Ids of the documents of the train split that are in the batches, whole or in part."""
    stream = np.concatenate([batch.stream[batch.stream >= 0] for batch in batches])
    special = list(tokenizer.special_tokens.values())
    return document_ids(open_dataset(data).split("train"), stream, special)


class _Captured(Exception):
    """Ends a forward pass after the required inputs were captured."""


class Calibration:
    """All calibration rows, advanced layer by layer through the quantized model and, for GPTAQ,
    through the original one as well.
    """

    def __init__(
        self,
        config: ModelConfig,
        batches: list[Batch],
        states: list[Tensor],
        originals: list[Tensor] | None,
    ) -> None:
        """`states` are the rows' quantized embeddings, `originals` those before, for GPTAQ."""
        self._batches = batches
        self._quantized = _Stream(config, batches, states)
        self._original = None if originals is None else _Stream(config, batches, originals)

    def hessian(self, blocks: "Blocks", part: str, stem: str) -> Hessian:
        """Run the rows through half `part` of the block up to linear `stem`; return X^T X of its
        inputs, with their drift if the original model runs along.
        """
        linear = cast(nn.Linear, blocks.quantized.get_submodule(f"{part}.{stem}"))
        hessian = Hessian(linear.in_features)
        self._quantized.forget()
        for index, batch in enumerate(self._batches):
            inputs = self._quantized.inputs(blocks.quantized, part, stem, index)
            written = torch.from_numpy(batch.segments >= 0)
            rows = inputs.flatten(0, 1) if written.all() else inputs[written]
            hessian.add(rows)
            if self._original is not None:
                original = self._original.inputs(blocks.original, part, stem, index)
                hessian.add_drift(original[written] - rows, rows)
        return hessian

    def advance(self, blocks: "Blocks", part: str, stem: str) -> None:
        """Add the output of half `part` of the block to the states; `stem` is its last linear."""
        self._quantized.advance(blocks.quantized, part, stem)
        if self._original is not None:
            self._original.advance(blocks.original, part, stem)


@dataclass(frozen=True)
class Blocks:
    """One block twice: with the weights that are quantized so far, and as it was."""

    quantized: Block
    original: Block


class _Stream:
    """Residual-stream states of all rows in one model."""

    def __init__(self, config: ModelConfig, batches: list[Batch], states: list[Tensor]) -> None:
        with torch.device("meta"):
            self._model = Transformer(config)  # only its rotary tables and masks are used
        self._batches, self._states = batches, states
        self._kept: dict[int, Tensor] = {}
        self._of: tuple[Block, str, str] | None = None

    def forget(self) -> None:
        """Drop the kept inputs: the weights before them have changed."""
        self._kept.clear()

    def advance(self, block: Block, part: str, stem: str) -> None:
        """Add a half's output to the states."""
        linear = block.get_submodule(f"{part}.{stem}")
        for index in range(len(self._batches)):
            self._states[index] += linear(self.inputs(block, part, stem, index))
        self._kept.clear()
        self._of = None  # else this block would live on beside the next

    def inputs(self, block: Block, part: str, stem: str, index: int) -> Tensor:
        """Inputs of a linear for one batch; the first 512 MiB are kept for `advance`."""
        if self._of != (block, part, stem):
            self._kept.clear()
            self._of = (block, part, stem)
        if index in self._kept:
            return self._kept[index]
        inputs = self._inputs(
            block, block.get_submodule(part), block.get_submodule(f"{part}.{stem}"), index
        )
        if sum(kept.nbytes for kept in self._kept.values()) + inputs.nbytes <= _KEPT_BYTES:
            self._kept[index] = inputs
        return inputs

    def _inputs(self, block: Block, half: nn.Module, linear: nn.Module, index: int) -> Tensor:
        """Inputs of `linear` in a half of `block` for one batch."""
        captured: list[Tensor] = []

        def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured.append(inputs[0])
            raise _Captured

        handle = linear.register_forward_pre_hook(capture)
        try:
            with contextlib.suppress(_Captured):
                self._run(block, half, self._batches[index], self._states[index])
        finally:
            handle.remove()
        return captured[0]

    def _run(self, block: Block, half: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """Output of one half of `Block.forward`; with halves, nothing is computed twice."""
        if half is block.mlp:
            return block.mlp(block.post_attention_layernorm(states))
        positions, segments = torch.from_numpy(batch.positions), torch.from_numpy(batch.segments)
        cos, sin = self._model.rotary(positions, states.dtype)
        mask = self._model.mask(states.shape[1], 0, segments, states.device)
        return block.self_attn(block.input_layernorm(states), cos, sin, mask, None)
