"""Whether the same ids mean the same bytes to data, teacher and student, and whether outputs have a
row for each.
"""

from typing import Any

import numpy as np

from xinslm.alignment.nested import is_nested
from xinslm.data.dataset import Dataset
from xinslm.doctor.checks import require


def dataset_vocabulary(dataset: Dataset, tokenizer: Any) -> str:
    """The dataset's tokenizer is the one it was made with, and knows all tokens."""
    splits = (dataset.split(name).tokens for name in dataset.manifest["splits"])
    largest = max(int(tokens.max()) for tokens in splits if len(tokens))
    own = tokenizer.fingerprint() == dataset.tokenizer_fingerprint
    return require(
        own and largest < tokenizer.vocab_size,
        f"largest id {largest:,} of {tokenizer.vocab_size:,}; tokenizer "
        f"{'as' if own else 'not as'} it was prepared",
        "Make the dataset again with `xinslm prepare`",
    )


def same_vocabulary(tokenizer: Any, other: Any, rows: int, what: str) -> str:
    """Ids mean the same bytes to `other`, and the model has an output row for each."""
    ids = np.arange(min(tokenizer.vocab_size, other.vocab_size))
    differing = [int(i) for i in ids if tokenizer.token_bytes(int(i)) != other.token_bytes(int(i))]
    detail = (
        f"{tokenizer.vocab_size:,} ids in the dataset, {other.vocab_size:,} in the {what}, "
        f"{rows:,} output rows"
    )
    if differing:
        first = differing[0]
        detail += (
            f"; {len(differing):,} ids mean other bytes, the first is {first}: "
            f"{tokenizer.token_bytes(first)!r} and {other.token_bytes(first)!r}"
        )
    fits = not differing and other.vocab_size == tokenizer.vocab_size <= rows
    return require(fits, detail, f"Prepare the data with the {what}'s tokenizer")


def teacher_vocabulary(tokenizer: Any, teacher: Any, cached: str | None) -> str:
    """The teacher's tokenizer is the dataset's, one that nests it, or the `cached` one."""
    if cached is not None and cached == teacher.tokenizer.fingerprint() != tokenizer.fingerprint():
        return f"another tokenizer, of {teacher.vocab_size:,} ids, which the cache was made with"
    if tokenizer.fingerprint() != teacher.tokenizer.fingerprint() and is_nested(
        tokenizer, teacher.tokenizer
    ):
        return f"nested: {tokenizer.vocab_size:,} ids, the teacher's {teacher.vocab_size:,}"
    return same_vocabulary(tokenizer, teacher.tokenizer, teacher.vocab_size, "teacher")
