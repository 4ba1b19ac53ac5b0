"""Calibration text that the model writes itself, if there is no dataset ("data-free", LLM-QAT, Liu
et al., arXiv:2305.17888, section 3.1).

LLM-QAT begins with a random token and takes the next few greedily. Here every token is drawn from
the model's distribution (see `author`): without a random one, greedy tokens would give every text
the same beginning. Texts are packed like those of a dataset. They follow from the seed, up to
rounding.

    rows = write_rows(source, load_tokenizer(source.path), RowShape(128, 512), seed=0)
"""

import math
from typing import Any

import numpy as np

from xinslm.data.dataset import Split
from xinslm.data.packing import PackedDataset
from xinslm.errors import XinslmError
from xinslm.model.source import ModelSource
from xinslm.progress import Listener, Progress, ignore
from xinslm.quantize.author import Author, Document, find_opening
from xinslm.quantize.calibration import CalibrationRows, RowShape, in_batches

_STAGE = "write calibration text"
_LEAST_TOKENS = 8
"""Mean length of texts below which rows are left unfilled instead of writing ever more texts."""
_NGRAM = 4
_LEAST_DISTINCT = 0.1
"""Share of distinct n-grams below which text counts as repetitive."""


def write_rows(
    source: ModelSource, tokenizer: Any, shape: RowShape, seed: int, on_progress: Listener = ignore
) -> CalibrationRows:
    """Let the model write `shape.rows` rows of `shape.length` tokens.

    Memory holds the model in float32, a packed copy of it if it is small, and at most 2 GiB of keys
    and values. UsageError if no token is there to start from, XinslmError if the model writes
    nothing.
    """
    opening, notes = find_opening(tokenizer, shape.length)
    needed, most = shape.rows * shape.length, shape.rows * max(1, shape.length // _LEAST_TOKENS)
    author = Author(source, tokenizer, opening, shape.length, seed)
    documents: list[Document] = []
    inputs, count = 0, shape.rows

    def tell(tokens: int) -> None:
        on_progress(Progress(_STAGE, min(inputs + tokens, needed), needed, "tokens"))

    while count:
        documents += author.write(len(documents), count, tell)
        inputs = sum(len(document.tokens) - 1 for document in documents)
        mean = max(inputs / len(documents), 1)
        count = max(min(math.ceil((needed - inputs) / mean), most - len(documents)), 0)
    rows = PackedDataset(_split(documents, tokenizer), shape.length)
    if not len(rows):
        raise XinslmError(
            f"{source.name} ends its texts before the second token, so it cannot write calibration "
            "text. Look at its tokenizer's BOS and EOS, or give text: --data-path DATASET"
        )
    on_progress(Progress(_STAGE, needed, needed, "tokens"))
    filled = (rows.batch(np.arange(len(rows))).segments >= 0).sum(axis=1)
    fullest = np.sort(np.argsort(-filled, kind="stable")[: shape.rows])
    written = np.concatenate([document.mask for document in documents])
    facts = {
        "method": "self-generated",
        "rows": len(fullest),
        "max_seq_length": shape.length,
        "seed": seed,
        "form": "text" if opening.turn_end is None else "chat",
        "texts": len(documents),
        "written_tokens": int(written.sum()),
    }
    notes += find_faults(documents, len(fullest), shape)
    return CalibrationRows(in_batches(rows, fullest), facts, notes=notes)


def _split(documents: list[Document], tokenizer: Any) -> Split:
    """The documents as a split in memory."""
    control = set(tokenizer.special_tokens.values())
    lengths = [len(document.tokens) for document in documents]
    num_bytes = [
        sum(len(tokenizer.token_bytes(token)) for token in ids if token not in control)
        for ids in (document.tokens.tolist() for document in documents)
    ]
    return Split(
        tokens=np.concatenate([document.tokens for document in documents]).astype(np.uint32),
        mask=np.concatenate([document.mask for document in documents]),
        documents=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        document_bytes=np.array(num_bytes, np.int64),
        vocab_size=tokenizer.vocab_size,
    )


def find_faults(documents: list[Document], num_rows: int, shape: RowShape) -> list[str]:
    """What makes the texts poor calibration, a sentence each."""
    notes = []
    at_once = sum(document.ended_at_once for document in documents)
    if 2 * at_once > len(documents):
        notes.append(
            f"the model ended {at_once:,} of its {len(documents):,} calibration texts at once; "
            "calibrate with --data-path DATASET"
        )
    if num_rows < shape.rows:
        notes.append(
            f"the model's calibration texts are so short that they fill {num_rows:,} rows of the "
            f"{shape.rows:,} asked for"
        )
    grams = [
        np.lib.stride_tricks.sliding_window_view(written, _NGRAM)
        for written in (document.tokens[document.mask > 0] for document in documents)
        if len(written) >= _NGRAM
    ]
    if grams:
        every = np.concatenate(grams)
        share = len(np.unique(every, axis=0)) / len(every)
        if share < _LEAST_DISTINCT:
            notes.append(
                f"the model's calibration texts repeat themselves: {share:.1%} of their sequences "
                f"of {_NGRAM} tokens are distinct; calibrate with --data-path DATASET"
            )
    return notes
