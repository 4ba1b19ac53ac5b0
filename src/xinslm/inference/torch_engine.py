"""The reference engine: a model in PyTorch with a key-value cache.

Quantized weights are dequantized on loading: results are those of the quantized model, memory and
speed are those of the unquantized one. Int8 activations give llama.cpp's arithmetic, more slowly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from xinslm.inference.engine import EngineBase
from xinslm.model.decode import RowDecoder
from xinslm.model.files import load_model
from xinslm.model.transformer import Transformer
from xinslm.precision import compute_dtype
from xinslm.ranges import Activations

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer

FIRST_CACHE_TOKENS = 256


class TorchEngine(EngineBase):
    """An `Engine` on a `Transformer`.

    Padding rows of the vocabulary, beyond the tokenizer's ids, are cut off and never sampled.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: "Tokenizer",
        name: str = "model",
        device: torch.device | str = "cpu",
        context_length: int | None = None,
    ) -> None:
        config = model.config
        super().__init__(
            name, tokenizer, context_length, config.max_position_embeddings, config.vocab_size
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        first = min(FIRST_CACHE_TOKENS, self.context_length)
        self._decoder = RowDecoder(self.model, 1, first, tokenizer.vocab_size)

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: str = "auto",
        dtype: str = "float32",
        context_length: int | None = None,
        activations: Activations = "float",
    ) -> "TorchEngine":
        """Load a model of any kind with its tokenizer."""
        from xinslm.device import pick_device
        from xinslm.tokenizer.load import load_tokenizer

        place = pick_device(device)
        if activations == "int8" and dtype == "auto":
            dtype = "float32"
        model = load_model(path, compute_dtype(dtype, place), activations=activations)
        return cls(model, load_tokenizer(path), str(path), place, context_length)

    def start(self, ids: Sequence[int]) -> np.ndarray:
        """Make `ids` the sequence; only tokens after the prefix shared with the last sequence are
        computed.
        """
        self.reused = self._shared(ids)
        self._ids = self._ids[: self.reused]
        return self._run(list(ids[self.reused :]))

    def step(self, token: int) -> np.ndarray:
        """Append one token; return the logits of the token after it."""
        self._require_room(self.position + 1)
        return self._run([token])

    def reset(self) -> None:
        """Forget the sequence."""
        self._ids, self.reused = [], 0

    def _run(self, ids: list[int]) -> np.ndarray:
        self._reserve(self.position + len(ids))
        self._decoder.lengths[0] = self.position
        logits = self._decoder.extend(np.array(ids))
        self._ids += ids
        result: np.ndarray = logits.float().cpu().numpy()
        return result

    def _reserve(self, length: int) -> None:
        """Grow the cache by doubling, so that memory follows the length in use."""
        size = self._decoder.keys.shape[2]
        if length > size:
            self._decoder.reserve(min(max(2 * size, length), self.context_length))
