"""Models that score text: the student, and any other causal language model that transformers runs.

Both give hidden states of a batch first and logits of chosen rows after, so that (batch, positions,
vocabulary) never exists at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError
from xinslm.inference.torch_engine import load_transformer
from xinslm.model.files import (
    QUANTIZED_WEIGHTS,
    check_vocabulary,
    is_own,
    resolve_model,
    weight_files,
)
from xinslm.model.transformer import Transformer

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer


class Scorer(Protocol):
    """A model as the perplexity sees it."""

    tokenizer: "Tokenizer"
    max_length: int
    """Most tokens in one window."""

    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Run sequences of ids as one batch; (total tokens, ...), the sequences one after
        another.
        """

    def logits(self, states: Tensor) -> Tensor:
        """(rows, ...) of `states` -> float32 logits (rows, tokenizer.vocab_size)."""


class TransformerScorer:
    """The student's own transformer as a `Scorer`."""

    def __init__(
        self, model: Transformer, tokenizer: "Tokenizer", name: str, device: torch.device | str
    ) -> None:
        check_vocabulary(model.config.vocab_size, tokenizer, name)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = model.config.max_position_embeddings
        self.device = torch.device(device)

    @torch.inference_mode()
    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Run sequences of ids, right-padded: attention looks back only, so pads disturb
        nothing.
        """
        lengths = torch.tensor([len(ids) for ids in sequences])
        batch = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
        for row, ids in zip(batch, sequences, strict=True):
            row[: len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
        real = torch.arange(batch.shape[1]) < lengths[:, None]
        hidden: Tensor = self.model.hidden(batch.to(self.device))
        return hidden[real.to(self.device)]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> float32 (rows, tokenizer.vocab_size); rows of a padded vocabulary are
        cut off.
        """
        return self.model.logits(states)[:, : self.tokenizer.vocab_size].float()


def load_scorer(
    path: Path, device: torch.device, dtype: str = "float32", context: int | None = None
) -> tuple[Scorer, dict[str, str | int]]:
    """Load any model folder; also return what it is: kind, parameters, file_bytes."""
    from xinslm.quantize.canonical import is_quantized
    from xinslm.tokenizer.load import load_tokenizer

    folder = resolve_model(path)
    kind: Literal["model", "quantized"] = "quantized" if is_quantized(folder) else "model"
    scorer: Scorer
    if kind == "quantized" or is_own(folder):
        model = load_transformer(folder, getattr(torch, dtype))
        parameters = model.config.num_parameters
        scorer = TransformerScorer(model, load_tokenizer(folder), str(path), device)
    else:
        from xinslm.teachers.huggingface import HuggingFaceTeacher

        other = HuggingFaceTeacher(str(path), dtype, device)
        parameters = sum(weight.numel() for weight in other.model.parameters())
        scorer = other
    if context is not None:
        if context > scorer.max_length:
            raise UsageError(
                f"--max-seq-length {context}: {path} reads at most {scorer.max_length:,} tokens"
            )
        scorer.max_length = context
    files = [folder / QUANTIZED_WEIGHTS] if kind == "quantized" else weight_files(folder)
    file_bytes = sum(file.stat().st_size for file in files)
    return scorer, {"kind": kind, "parameters": parameters, "file_bytes": file_bytes}
