"""Which way leads from a teacher's tokenizer to the dataset's, and why not another.

    same     one tokenizer: the teacher's distributions as they are
    nested   the dataset's merges are the teacher's first: an exact push-forward (`nested`)
    prefixes any two: masses of the student's tokens that begin with the same bytes (`prefixes`)
    bytes    any two: a push-forward where both begin a token at one byte, as far as it is
    determined (`bytewise`)
    chunks   any two: likelihoods of the stretches between such places (`cache.chunks`); the least
    informative

`auto` takes the first of these that is possible.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from xinslm.alignment.byte_prefix import SAMPLE_TOKENS, PrefixAligner
from xinslm.alignment.bytewise import BytePush
from xinslm.alignment.nested import PushForward, is_nested
from xinslm.alignment.spans import SpanAligner
from xinslm.cache.config import Alignment
from xinslm.data.dataset import Dataset
from xinslm.errors import UsageError, XinslmError

Push = PushForward | BytePush
LEAST_EXACT = 16
"""Student tokens of which the teacher must be able to tell the whole probability, for `bytes` to be
worth it.
"""


def relate(
    dataset: Dataset, teacher: Any, wish: Alignment = "auto", over_tokens: bool = False
) -> Push | SpanAligner | None:
    """None where teacher and dataset share their tokenizer, else what maps the one to the other.

    With `over_tokens`, `auto` takes only ways that give distributions over single tokens.

    Raises UsageError, with a reason for each way, where `wish` is not possible.
    """
    from xinslm.tokenizer.load import load_tokenizer

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
            return PushForward(own, teacher.tokenizer)
        reasons.append("nested: the dataset's tokenizer is not a merge prefix of the teacher's")
    end = dataset.manifest.get("document_end", "eos")
    if wish == "prefixes" or (wish == "auto" and not over_tokens):
        try:
            return PrefixAligner(own, teacher.tokenizer, end, _sample(dataset))
        except XinslmError as error:
            reasons.append(f"prefixes: {error}")
    if wish in ("auto", "bytes"):
        try:
            push = BytePush(own, teacher.tokenizer, end)
            if (exact := int(push.exact.sum())) >= LEAST_EXACT:
                return push
            reasons.append(
                f"bytes: the teacher tells the probability of {exact} of "
                f"{own.vocab_size:,} tokens only"
            )
        except XinslmError as error:
            reasons.append(f"bytes: {error}")
    if wish == "chunks" or (wish == "auto" and not over_tokens):
        try:
            return SpanAligner(own, teacher.tokenizer, end)
        except XinslmError as error:
            reasons.append(f"chunks: {error}")
    raise UsageError(
        f"no way leads from the tokenizer of teacher {teacher.name} to that of dataset "
        f"{dataset.folder} with "
        f"--alignment {wish}:\n  " + "\n  ".join(reasons) + "\nPrepare the dataset with the "
        "teacher's own tokenizer "
        f"(`xinslm prepare --tokenizer-path {teacher.name}`), with one that is nested in it "
        "(`xinslm tokenizer train "
        f"--prefix-of {teacher.name}`), or leave --alignment out"
    )


def _sample(dataset: Dataset) -> Iterator[np.ndarray]:
    """Documents of the train split, from its beginning."""
    split = dataset.split("train")
    for begin, end in pairwise(split.documents):
        if begin >= SAMPLE_TOKENS:
            return
        yield np.asarray(split.tokens[begin:end])


def kind_of(way: Push | SpanAligner | None) -> str:
    """Name of a way that `relate` found."""
    return "same" if way is None else way.kind
