"""Checks for the user's own tasks, next to those of IFEval.

Texts are compared literally in `contains` and `not_contains`; `equals` ignores case, punctuation
and articles.
"""

import re

from xinslm.evaluate.instructions.answers import exact_match
from xinslm.evaluate.instructions.base import Check, answered
from xinslm.evaluate.instructions.checks import CHECKS
from xinslm.evaluate.instructions.checks_format import parse_json
from xinslm.evaluate.instructions.words import count_words


@answered
def contains(response: str, text: str) -> bool:
    """A text occurs in the response, in this spelling."""
    return text in response


@answered
def not_contains(response: str, text: str) -> bool:
    """A text does not occur in the response, in this spelling."""
    return text not in response


@answered
def matches(response: str, pattern: str) -> bool:
    """A regular expression is found in the response; "^" and "$" are beginning and end."""
    return re.search(pattern, response.strip()) is not None


@answered
def equals(response: str, text: str) -> bool:
    """The response is a text, apart from case, punctuation, articles and spaces."""
    return exact_match(response, [text])


@answered
def is_json(response: str, required: list[str] | None = None) -> bool:
    """The response is JSON, also in a Markdown block; with the `required` keys, if any."""
    valid, value = parse_json(response)
    if required is None:
        return valid
    return isinstance(value, dict) and all(key in value for key in required)


@answered
def max_words(response: str, words: int) -> bool:
    """The response has at most so many words."""
    return count_words(response) <= words


@answered
def min_words(response: str, words: int) -> bool:
    """The response has at least so many words."""
    return count_words(response) >= words


CUSTOM_CHECKS: dict[str, Check] = {
    **CHECKS,
    "contains": contains,
    "not_contains": not_contains,
    "regex": matches,
    "equals": equals,
    "json": is_json,
    "max_words": max_words,
    "min_words": min_words,
}
"""IFEval's checks and those of this file."""
