"""A teacher in our own transformer: scores right-padded batches, writes with a key-value cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.model.transformer import KVCache, Transformer
from xinslm.teachers.base import Generation, Prompt, Sampling
from xinslm.teachers.generate import Step, write
from xinslm.teachers.huggingface import tapped


class OwnTeacher:
    """Gives distributions, hidden states and text; a `DenseTeacher`, `HiddenTeacher` and `GeneratingTeacher`."""

    def __init__(
        self, name: str, folder: Path, model: Transformer, tokenizer: Any, device: torch.device | str = "cpu"
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise XinslmError(
                f"teacher {name}: its tokenizer has {tokenizer.vocab_size} ids, its output only "
                f"{model.config.vocab_size} rows; the tokenizer belongs to another model"
            )
        self.name, self.folder, self.tokenizer = name, folder, tokenizer
        self.vocab_size: int = tokenizer.vocab_size
        self.num_layers, self.hidden_size = model.config.num_hidden_layers, model.config.hidden_size
        self.max_length = model.config.max_position_embeddings
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Hidden states of all tokens of the sequences, one behind the other: (total tokens, hidden)."""
        longest = max(len(s) for s in sequences)
        if longest > self.max_length:
            raise UsageError(f"teacher {self.name} has a context of {self.max_length} tokens, {longest} are asked for")
        batch = np.zeros((len(sequences), longest), dtype=np.int64)
        real = np.zeros((len(sequences), longest), dtype=bool)
        for row, ids in enumerate(sequences):
            batch[row, : len(ids)], real[row, : len(ids)] = ids, True
        hidden: Tensor = self.model.hidden(torch.from_numpy(batch).to(self.device))
        return hidden[torch.from_numpy(real).to(self.device)]

    def states_and_hidden(self, sequences: list[np.ndarray], depths: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """What `states` gives, and what comes out of blocks `depths` (from 1), (total tokens, hidden_size) each."""
        lengths = torch.tensor([len(s) for s in sequences], device=self.device)
        with tapped(self.model, self.num_layers, depths, self.name) as outputs:
            states = self.states(sequences)
        real = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        return states, [outputs[depth][real] for depth in depths]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab_size) float32."""
        return self.model.logits(states)[:, : self.vocab_size].float()

    def generate(self, prompts: Sequence[Prompt], keys: Sequence[int], sampling: Sampling) -> list[Generation]:
        """Answer a batch of prompts."""
        return write(self._begin, self.tokenizer, self.max_length, self.name, prompts, keys, sampling)

    @torch.inference_mode()
    def _begin(self, ids: np.ndarray, room: int) -> tuple[Tensor, Step]:
        """Read (B, T) ids; logits of what follows, and the function that takes one token a row more."""
        cache = KVCache(self.model.config, len(ids), ids.shape[1] + room, self.model.head_weight.dtype, self.device)

        @torch.inference_mode()
        def step(tokens: np.ndarray) -> Tensor:
            hidden = self.model.hidden(torch.from_numpy(tokens).to(self.device), cache=cache)
            return self.logits(hidden[:, -1])

        return step(ids), lambda tokens: step(tokens[:, None])
