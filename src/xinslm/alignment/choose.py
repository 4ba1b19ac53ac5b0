"""How a teacher's tokenizer maps to the dataset's.

    same         one tokenizer: the teacher's distributions as they are
    nested       the dataset's merges are the teacher's first ones: exact sums (`nested`)
    prefixes     any two: masses of tokens that begin with the same bytes (`byte_prefix`)

`auto` takes the first of these that is possible.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from xinslm.alignment import Alignment
from xinslm.alignment.byte_prefix import SAMPLE_TOKENS, BytePrefixAligner
from xinslm.alignment.nested import NestedProjection, is_nested
from xinslm.data.dataset import Dataset
from xinslm.errors import UsageError, XinslmError
from xinslm.tokenizer.load import load_tokenizer


def choose_alignment(
    dataset: Dataset, teacher: Any, wish: Alignment = "auto", over_tokens: bool = False
) -> NestedProjection | BytePrefixAligner | None:
    """None if teacher and dataset share their tokenizer, else what maps one to the other.

    With `over_tokens` the mapping must give distributions over single tokens, which `byte_prefix`
    does not. Raises UsageError with the reasons if `wish` is not possible.
    """
    own = load_tokenizer(dataset.folder / "tokenizer")
    if teacher.tokenizer.fingerprint() == dataset.tokenizer_fingerprint:
        if wish in ("auto", "same"):
            return None
        reasons = ["same is possible and exact: the tokenizers are one"]
    else:
        reasons = [
            f"same: the tokenizers differ ({own.vocab_size:,} and {teacher.vocab_size:,} ids)"
        ]
    if wish in ("auto", "nested"):
        if is_nested(own, teacher.tokenizer):
            return NestedProjection(own, teacher.tokenizer)
        reasons.append("nested: the dataset's tokenizer is not a merge prefix of the teacher's")
    if wish in ("auto", "byte_prefix"):
        try:
            if over_tokens:
                raise XinslmError(
                    "hidden states and on-policy rounds need the teacher's tokenizer or a nested "
                    "one"
                )
            end = dataset.manifest.get("document_end", "eos")
            return BytePrefixAligner(own, teacher.tokenizer, end, _sample(dataset))
        except XinslmError as error:
            reasons.append(f"byte_prefix: {error}")
    listed = "\n  ".join(reasons)
    raise UsageError(
        f"the tokens of teacher {teacher.name} cannot be mapped to those of dataset "
        f"{dataset.folder} with --alignment {wish}:\n  {listed}\nPrepare the dataset with the "
        f"teacher's own tokenizer (`xinslm prepare --tokenizer-path {teacher.name}`), with one "
        f"that is nested in it (`xinslm tokenizer train --prefix-of {teacher.name}`), or leave "
        "--alignment out"
    )


def _sample(dataset: Dataset) -> Iterator[np.ndarray]:
    """Documents of the train split, from its beginning."""
    split = dataset.split("train")
    for begin, end in pairwise(split.documents):
        if begin >= SAMPLE_TOKENS:
            return
        yield np.asarray(split.tokens[begin:end])


def alignment_name(aligner: NestedProjection | BytePrefixAligner | None) -> str:
    """Name of a way that `choose_alignment` found."""
    return "same" if aligner is None else aligner.kind
