"""Compares a short answer with references: exact match and token F1 (SQuAD, Rajpurkar et al. 2016).

Both look at normalized text: lower-case, without ASCII punctuation, without "a", "an" and "the".
One difference to SQuAD's program: articles, then punctuation, stay if nothing else is left, so that
the choice "A" of a multiple-choice question and the answer "+" are not empty.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """Return the text that two equal answers share."""
    plain = text.lower().translate(_PUNCTUATION)
    without = _ARTICLES.sub(" ", plain).split()
    return " ".join(without or plain.split() or text.lower().split())


def exact_match(response: str, references: Sequence[str]) -> bool:
    """Return whether a response equals one of the references, normalized."""
    answer = normalize(response)
    return bool(answer) and any(answer == normalize(reference) for reference in references)


def token_f1(response: str, references: Sequence[str]) -> float:
    """Return the best F1 of the words shared with one of the references."""
    return max(_f1(normalize(response).split(), normalize(text).split()) for text in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference)) if common else 0.0
