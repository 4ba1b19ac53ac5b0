"""Calibration: packed rows of a dataset's train split and their activations, layer by layer.

Rows pass through layers that are already quantized, so that each layer is fitted to its actual
inputs (GPTQ's "true sequential" order). Padding never enters a Hessian, and documents do not attend
to each other.
"""

import contextlib
from pathlib import Path
from typing import Any

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
    step = max(_TOKENS_A_BATCH // length, 1)
    return [rows.batch(chosen[i : i + step]) for i in range(0, num_rows, step)], dataset.fingerprint


def text_ids_of(data: Path | None, batches: list[Batch], tokenizer: Any) -> list[str]:
    """Ids of the documents of the train split that are in the batches, whole or in part."""
    assert data is not None, "batches come from a dataset"
    stream = np.concatenate([batch.stream[batch.stream >= 0] for batch in batches])
    special = list(tokenizer.special_tokens.values())
    return document_ids(open_dataset(data).split("train"), stream, special)


class _Captured(Exception):
    """Ends a forward pass after the required inputs were captured."""


class Calibration:
    """Residual-stream states of all calibration rows, advanced layer by layer."""

    def __init__(self, config: ModelConfig, batches: list[Batch], states: list[Tensor]) -> None:
        with torch.device("meta"):
            self._model = Transformer(config)  # only its rotary tables and masks are used
        self._batches, self._states = batches, states
        self._kept: dict[tuple[nn.Module, int], Tensor] = {}

    def hessian(self, block: Block, half: nn.Module, linear: nn.Linear) -> Hessian:
        """Run the rows through a half of `block` up to `linear`; return X^T X of its inputs.

        The first 512 MiB of the inputs are kept until the next call, for `advance`.
        """
        hessian = Hessian(linear.in_features)
        self._kept.clear()
        room = _KEPT_BYTES
        for index, batch in enumerate(self._batches):
            inputs = self._inputs(block, half, linear, index)
            written = torch.from_numpy(batch.segments >= 0)
            hessian.add(inputs.flatten(0, 1) if written.all() else inputs[written])
            room -= inputs.nbytes
            if room >= 0:
                self._kept[linear, index] = inputs
        return hessian

    def advance(self, block: Block, half: nn.Module, linear: nn.Linear) -> None:
        """Add the output of a half of `block`, attention or feed-forward, to the states; `linear`
        is the half's last.
        """
        for index in range(len(self._batches)):
            inputs = self._kept.pop((linear, index), None)
            if inputs is None:
                inputs = self._inputs(block, half, linear, index)
            self._states[index] += linear(inputs)

    def _inputs(self, block: Block, half: nn.Module, linear: nn.Linear, index: int) -> Tensor:
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
