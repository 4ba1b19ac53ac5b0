"""Scoring with int8 activations in the native library: the arithmetic of
`Transformer(activations="int8")` and of llama.cpp, many times as fast as either PyTorch engine's.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xinslm.inference.native_engine import CHUNK, build
from xinslm.inference.raw_weights import RawModel
from xinslm.native.model import NativeContext, default_threads
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer


class NativeScorer:
    """A `DenseTeacher` on the native library."""

    device = torch.device("cpu")

    def __init__(self, name: Path | str, raw: RawModel, fingerprint: str) -> None:
        self.name, self.fingerprint = str(name), fingerprint
        self.tokenizer = load_tokenizer(name)
        check_vocabulary(raw.config.vocab_size, self.tokenizer, self.name)
        self.vocab_size: int = self.tokenizer.vocab_size
        self.max_length = raw.config.max_position_embeddings
        self.context = NativeContext(build(raw), default_threads())

    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Outputs of the last layer, float32 (total tokens, hidden)."""
        parts = []
        for ids in sequences:
            tokens = np.asarray(ids).tolist()
            number = self.context.add()
            try:
                for at in range(0, len(tokens), CHUNK):
                    part = tokens[at : at + CHUNK]
                    owners, wanted = [number] * len(part), range(len(part))
                    parts.append(self.context.extend_states(part, owners, wanted))
            finally:
                self.context.remove(number)
        return torch.from_numpy(np.concatenate(parts))

    def logits(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab_size) float32."""
        return torch.from_numpy(self.context.logits(states.numpy()))[:, : self.vocab_size]


def int8_layers(raw: RawModel) -> tuple[int, int]:
    """Linear layers whose inputs are rounded to int8, and all of them, the head included."""
    head = "model.embed_tokens.weight" if raw.config.tie_word_embeddings else "lm_head.weight"
    linear = [name for name in raw.names if name.endswith("_proj.weight")]
    return len(raw.coded.intersection([*linear, head])), len(linear) + 1
