"""A Hugging Face causal language model that generates: any architecture that keeps a cache.

Prompts of different lengths share a batch without pads: as many tokens are read at once as the
shortest prompt has, and the caller gives the rest of the longer ones token by token. So a model
needs no support for attention masks or positions, only a cache.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError


class HuggingFaceDecoder:
    """A `Decoder`; a new batch begins with `read`."""

    refills = False

    def __init__(self, model: Any, vocab_size: int, name: str) -> None:
        self.model, self.vocab_size, self.name = model, vocab_size, name
        self.token_forwards = 0
        # rows whose logits are not read are never made: the head sees the last position alone
        keeps = "logits_to_keep" in signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if keeps else {}
        self._cache: Any = None
        self._size = 0
        """Rows in the cache."""
        self._rows = torch.empty(0, dtype=torch.int64)
        """Those of them that are kept."""

    def read(self, rows: Sequence[int], prompts: Sequence[np.ndarray]) -> tuple[Tensor, np.ndarray]:
        """Begin a batch; see `Decoder`."""
        shortest = min(len(prompt) for prompt in prompts)
        self._cache, self._size, self._rows = None, len(prompts), torch.arange(len(prompts))
        ids = torch.from_numpy(np.stack([prompt[:shortest] for prompt in prompts]))
        return self._run(ids), np.full(len(prompts), shortest)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, (B,); return the next logits (B, V)."""
        return self._run(tokens[:, None])

    def keep(self, rows: np.ndarray) -> None:
        """Keep only these rows, in this order; a cache of unknown kind keeps all of them."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        index = torch.from_numpy(rows)
        layers = getattr(self._cache, "layers", [None])
        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            self._cache.batch_select_indices(index.to(self.model.device))
            self._size, self._rows = len(rows), torch.arange(len(rows))
        else:
            self._rows = self._rows[index]

    @torch.inference_mode()
    def _run(self, ids: Tensor) -> Tensor:
        if len(ids) < self._size:
            ids = torch.zeros(self._size, 1, dtype=torch.int64).index_copy(0, self._rows, ids)
        self.token_forwards += ids.numel()
        out = self.model(
            input_ids=ids.to(self.model.device),
            past_key_values=self._cache,
            use_cache=True,
            **self._options,
        )
        self._cache = out.past_key_values
        if self._cache is None:
            raise UsageError(
                f"teacher {self.name} keeps no key-value cache, so it cannot write text here"
            )
        logits: Tensor = out.logits[:, -1, : self.vocab_size]
        return logits if len(self._rows) == self._size else logits[self._rows]
