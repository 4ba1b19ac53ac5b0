"""Teachers in our transformer: they score padded batches and generate with a key-value cache."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.model.files import check_vocabulary, load_model, model_fingerprint
from xinslm.model.transformer import KVCache, Transformer
from xinslm.teachers.generate import Step
from xinslm.teachers.local import LocalTeacher


class OwnTeacher(LocalTeacher):
    """Gives distributions, hidden states and text; a `DenseTeacher`, `HiddenTeacher` and
    `GeneratingTeacher`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        model: Transformer,
        tokenizer: Any,
        device: torch.device | str = "cpu",
    ) -> None:
        check_vocabulary(model.config.vocab_size, tokenizer, name)
        self.name, self.folder, self.tokenizer = name, folder, tokenizer
        self.vocab_size: int = tokenizer.vocab_size
        self.num_layers, self.hidden_size = model.config.num_hidden_layers, model.config.hidden_size
        self.max_length = model.config.max_position_embeddings
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and the shape."""
        return model_fingerprint(self.folder)

    @torch.no_grad()
    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Hidden states of all tokens of the sequences, concatenated: (total tokens, hidden)."""
        inputs, real = self.padded(sequences)
        hidden: Tensor = self.model.hidden(inputs)
        return hidden[real]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab_size) float32."""
        return self.model.logits(states)[:, : self.vocab_size].float()

    @torch.inference_mode()
    def begin(self, ids: np.ndarray, room: int) -> tuple[Tensor, Step]:
        """Read (B, T) ids; return the next logits and the step for one more token per row."""
        cache = KVCache(
            self.model.config,
            len(ids),
            ids.shape[1] + room,
            self.model.head_weight.dtype,
            self.device,
        )

        @torch.inference_mode()
        def step(tokens: np.ndarray) -> Tensor:
            hidden = self.model.hidden(torch.from_numpy(tokens).to(self.device), cache=cache)
            return self.logits(hidden[:, -1])

        return step(ids), lambda tokens: step(tokens[:, None])


class LlamaTeacher(OwnTeacher):
    """A LLaMA or Mistral folder: results equal to transformers within float32 rounding, without
    importing it.
    """

    def __init__(
        self, name: str, folder: Path, dtype: str = "float32", device: torch.device | str = "cpu"
    ) -> None:
        from xinslm.tokenizer.load import load_tokenizer

        super().__init__(
            name, folder, load_model(folder, getattr(torch, dtype)), load_tokenizer(folder), device
        )
