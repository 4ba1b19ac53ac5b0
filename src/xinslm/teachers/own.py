"""Teachers in our transformer: they score batches of texts and generate with a key-value cache.

Results equal those of transformers within float32 rounding, without importing it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xinslm.model.decode import RowDecoder, token_bytes
from xinslm.model.source import ModelSource
from xinslm.model.transformer import Transformer
from xinslm.precision import (
    has_narrow_products,
    round_products,
    rounds_products,
    weight_dtype,
)
from xinslm.ranges import Activations
from xinslm.teachers.local import LocalTeacher
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer

KEPT_OUTPUTS = 1 << 21
"""Outputs that memory is kept for from the first call of `outputs` on, 8 MB in float32."""


class OwnTeacher(LocalTeacher):
    """Gives distributions, hidden states and text; a `DenseTeacher` and `HiddenTeacher`."""

    def __init__(
        self,
        source: ModelSource,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        tokenizer: str | None = None,
        activations: Activations = "float",
    ) -> None:
        """Load the model; `tokenizer` names the one that replaces its own."""
        if activations == "int8" and dtype == "auto":
            dtype = "float32"
        self.source, self.name = source, source.name
        self.tokenizer = load_tokenizer(source.path if tokenizer is None else tokenizer)
        model = source.transformer(weight_dtype(dtype, device), False, activations)
        check_vocabulary(model.config.vocab_size, self.tokenizer, self.name)
        self.vocab_size: int = self.tokenizer.vocab_size
        self.num_layers, self.hidden_size = model.config.num_hidden_layers, model.config.hidden_size
        self.max_length = model.config.max_position_embeddings
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._writer: Transformer | None = None
        self._outputs: Tensor | None = None
        self._writes_narrow = has_narrow_products(dtype, device)
        if rounds_products(dtype, device):
            round_products(self.model)
        self.cache_bytes_per_token = token_bytes(self.model)
        self.packs = self.device.type == "cpu"
        """Whether texts share a row: tiles cost nothing between them, a mask would."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and the shape."""
        return self.source.fingerprint

    @torch.no_grad()
    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Hidden states of all tokens of the sequences, concatenated: (total tokens, hidden)."""
        states, _ = self.states_and_hidden(sequences, ())
        return states

    @torch.no_grad()
    def states_and_hidden(
        self, sequences: list[np.ndarray], depths: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`states`, and the outputs of blocks `depths` (from 1), each (total tokens, hidden)."""
        if not self.packs:
            inputs, real = self.padded(sequences)
            states, outputs = self._read(inputs, None, None, depths)
            return states[real], [output[real] for output in outputs]
        self.check_lengths(sequences)
        lengths = [len(ids) for ids in sequences]
        arrays = (
            np.concatenate(sequences).astype(np.int64),
            np.concatenate([np.arange(length) for length in lengths]),
            np.repeat(np.arange(len(lengths)), lengths),
        )
        ids, positions, segments = (torch.from_numpy(array)[None] for array in arrays)
        states, outputs = self._read(ids, positions, segments, depths)
        return states[0], [output[0] for output in outputs]

    def _read(
        self,
        ids: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        depths: Sequence[int],
    ) -> tuple[Tensor, list[Tensor]]:
        found = self.model.hidden(ids, positions, segments, layers=tuple(depths))
        return found if depths else (found, [])

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab_size) float32."""
        return self.model.logits(states)[:, : self.vocab_size].float()

    @property
    def output_size(self) -> int:
        """Rows of the output matrix, padding included."""
        return self.model.config.vocab_size

    @torch.no_grad()
    def outputs(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, output_size), padding included, in float32 at least; the next
        call writes over them.

        Fresh memory for each block costs a third of the product, and stays with the process.
        """
        if self._outputs is None or len(self._outputs) < len(states):
            # a larger block later would leave this one's place empty; untouched memory is free
            rows = max(len(states), KEPT_OUTPUTS // self.output_size)
            self._outputs = states.new_empty(rows, self.output_size)
        logits = self.model.logits(states, self._outputs[: len(states)])
        return logits if logits.dtype == torch.float64 else logits.float()

    def open_decoder(self, rows: int, length: int) -> RowDecoder:
        """A cache for `rows` texts of `length` tokens."""
        if self._writer is None:
            # few rows are bound by memory, and rounding needs the weights in float32
            narrow = self._writes_narrow
            self._writer = self.source.transformer(torch.bfloat16) if narrow else self.model
        return RowDecoder(self._writer, rows, length, self.vocab_size)
