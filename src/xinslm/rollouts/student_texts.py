"""Prompts from a dataset, and the student's continuations as a dataset of their own.

The prompt is context, the continuation gives the targets; their number normalises the loss. The
student's most likely tokens at each target are stored with the tokens (`support`), so that the
teacher can score them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache.support import write_support
from xinslm.data.dataset import KIND, VERSION, Dataset, Split
from xinslm.data.writer import SplitWriter
from xinslm.errors import UsageError
from xinslm.files import write_manifest
from xinslm.folders import new_folder
from xinslm.teachers.generate import Completions


@dataclass(frozen=True)
class Prompts:
    """Prompts from a split's documents."""

    split: Split
    documents: np.ndarray
    """Indices of the documents that give a prompt, int64, (n,)."""
    lengths: np.ndarray
    """Length of each prompt in tokens, int64, (n,)."""
    skipped: int
    """Number of documents whose prompt is too long, or that have no answer."""

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Token ids of prompts, by their index in `documents`."""
        starts = self.split.documents[self.documents[numbers]]
        return [
            np.asarray(self.split.tokens[a : a + n], dtype=np.int64)
            for a, n in zip(starts, self.lengths[numbers], strict=True)
        ]


def find_prompts(dataset: Dataset, prompt_tokens: int, longest: int) -> Prompts:
    """Prompts of the train split with at most `longest` tokens.

    If more than a document's first token is masked, the masked beginning is the prompt; otherwise
    its first `prompt_tokens` tokens, at most half of it. Raises UsageError if no prompt is short
    enough.
    """
    split = dataset.split("train")
    starts, ends = split.documents[:-1], split.documents[1:]
    targets = np.flatnonzero(np.asarray(split.mask))
    place = np.searchsorted(targets, starts)
    # the first target at or behind a document's start
    first = np.append(targets, np.iinfo(np.int64).max)[place]
    plain = np.maximum(1, np.minimum(prompt_tokens, (ends - starts) // 2))
    lengths = np.where(first - starts > 1, first - starts, plain)
    fits = (first < ends) & (lengths <= longest)
    if not fits.any():
        raise UsageError(
            f"{dataset.folder} has no prompt of at most {longest} tokens. Give a smaller "
            "--max-new-tokens or "
            f"--prompt-tokens, or a larger --max-seq-length"
        )
    kept = np.flatnonzero(fits)
    return Prompts(split, kept, lengths[kept], len(starts) - len(kept))


def write_texts(
    folder: Path,
    prompts: list[np.ndarray],
    written: Completions,
    tokenizer: Any,
    made_from: dict[str, str],
    settings: dict[str, Any],
) -> None:
    """Write prompts and completions as a dataset folder with one split, `train`."""
    vocab_size = tokenizer.vocab_size
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    control = set(tokenizer.special_tokens.values())
    num_bytes = np.array(
        [0 if i in control else len(tokenizer.token_bytes(i)) for i in range(vocab_size)]
    )
    with new_folder(folder) as partial:
        with SplitWriter(partial / "train", dtype) as writer:
            for prompt, text in zip(prompts, written.texts, strict=True):
                mask = np.repeat(np.array([0, 1], np.uint8), (len(prompt), len(text.tokens)))
                writer.append(
                    np.concatenate([prompt, text.tokens]), mask, int(num_bytes[text.tokens].sum())
                )
            facts = writer.finish()
        write_support(
            partial / "train", np.concatenate([text.top for text in written.texts]), vocab_size
        )
        tokenizer.save(partial / "tokenizer")
        write_manifest(
            partial,
            KIND,
            VERSION,
            settings,
            {"tokenizer": tokenizer.fingerprint(), **made_from},
            vocab_size=vocab_size,
            dtype=dtype.name,
            document_end="none",
            splits={"train": facts},
            source_names=["the student"],
            ended=sum(text.ended for text in written.texts),
            token_forwards=written.token_forwards,
        )
