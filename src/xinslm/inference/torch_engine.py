"""The reference engine: a model in PyTorch with a key-value cache.

Quantized weights are dequantized on loading: results are those of the quantized model, memory and
speed are those of the unquantized one. Int8 activations give llama.cpp's arithmetic, more slowly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from xinslm.errors import UsageError
from xinslm.inference.engine import common_prefix
from xinslm.model.decode import RowDecoder
from xinslm.model.files import check_vocabulary, load_model
from xinslm.model.transformer import Transformer
from xinslm.precision import compute_dtype
from xinslm.ranges import Activations

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer

FIRST_CACHE_TOKENS = 256


class TorchEngine:
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
        own = model.config.max_position_embeddings
        if context_length is not None and not 1 <= context_length <= own:
            raise UsageError(
                f"--max-seq-length {context_length}: the context of {name} holds 1 to {own:,} "
                f"tokens"
            )
        check_vocabulary(model.config.vocab_size, tokenizer, name)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        self.context_length = context_length or own
        self.device = torch.device(device)
        self.reused = 0
        self._ids: list[int] = []
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

    @property
    def position(self) -> int:
        """Number of tokens in the sequence."""
        return len(self._ids)

    def start(self, ids: Sequence[int]) -> np.ndarray:
        """Make `ids` the sequence; only tokens after the prefix shared with the last sequence are
        computed.
        """
        if not ids:
            raise ValueError("a text needs at least one token to start from")
        self._require_room(len(ids))
        # the last token is computed again for its logits
        self.reused = min(common_prefix(self._ids, ids), len(ids) - 1)
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

    def _require_room(self, length: int) -> None:
        if length > self.context_length:
            raise UsageError(
                f"the text has {length:,} tokens, the context of {self.name} holds "
                f"{self.context_length:,}; "
                f"shorten the text"
            )

    def _reserve(self, length: int) -> None:
        """Grow the cache by doubling, so that memory follows the length in use."""
        size = self._decoder.keys.shape[2]
        if length > size:
            self._decoder.reserve(min(max(2 * size, length), self.context_length))
