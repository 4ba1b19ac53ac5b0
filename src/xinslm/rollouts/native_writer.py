"""Texts written by the native engine: weights of 4 and 8 bits, activations of 8.

Products of integers take a third to a half of the time of float32 ones, for a model that is .005
nats away from itself in float32 (SmolLM2-135M, docs/results.md): the texts are its own up to that,
and what a teacher thinks of them is computed in float32 afterwards.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError
from xinslm.inference.config import EngineName
from xinslm.inference.load import library_note, native_model
from xinslm.inference.native_batch import NativeBatch, with_8_bit_weights
from xinslm.model.files import open_model
from xinslm.teachers.local import LocalWriter
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer


class NativeWriter(LocalWriter):
    """A teacher that answers prompts in the native engine, and cannot score."""

    def __init__(self, batch: NativeBatch, tokenizer: Any, name: str, fingerprint: str) -> None:
        """`fingerprint`: the model's, as `ModelSource` gives it."""
        self.name, self.tokenizer, self.fingerprint = name, tokenizer, fingerprint
        self.batch, self.max_length = batch, batch.max_length
        self.open_decoder, self.cache_bytes_per_token = (
            batch.open_decoder,
            batch.cache_bytes_per_token,
        )


def open_batch(
    engine: EngineName, model: Path | str, vocab_size: int, device: str, dtype: str
) -> NativeBatch | None:
    """The model in the native engine, with its float matrices in 8 bits; None if `engine` leaves it
    to PyTorch.

    Raises UsageError if that engine is asked for and cannot run the model so.
    """
    if engine == "pytorch":
        return None
    raw, problem = native_model(model, device, dtype)
    if raw is None or problem:
        if engine == "native":
            raise UsageError(f"--engine native: {problem}")
        return None
    return NativeBatch(with_8_bit_weights(raw), vocab_size)


def open_writer(
    engine: EngineName,
    name: str,
    device: str,
    dtype: str,
    revision: str | None = None,
    tokenizer: str | None = None,
    tell: Callable[[str], None] = lambda note: None,
) -> NativeWriter | None:
    """A teacher that writes in the native engine; None if `engine` leaves it to PyTorch, which
    `tell` hears if only the library is missing.

    `tokenizer` names the one that replaces the model's own.
    """
    if engine == "pytorch":
        return None
    source = open_model(name, revision)
    own = load_tokenizer(source.path if tokenizer is None else tokenizer)
    batch = open_batch(engine, source.path, own.vocab_size, device, dtype)
    if batch is None:
        if note := library_note(source.path, device, dtype):
            tell(note)
        return None
    check_vocabulary(batch.context.model.shape.vocabulary, own, source.name)
    return NativeWriter(batch, own, source.name, source.fingerprint)
