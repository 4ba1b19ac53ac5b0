"""The 25 instruction types of IFEval (Zhou et al. 2023, arXiv:2311.07911) by their official ids.

The results are those of lm-evaluation-harness 0.4.13, which follows the authors' program, but for
three things: sentences are split without a trained model (`sentences.py`), language detection has a
fixed seed (`language.py`), and nothing is drawn at random where an argument is missing.

    CHECKS["keywords:existence"]("A red fox", keywords=["fox"])     # True
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xinslm.evaluate.instructions import checks_format as form
from xinslm.evaluate.instructions import checks_words as words
from xinslm.evaluate.instructions.base import Check
from xinslm.evaluate.instructions.language import is_available

CHECKS: dict[str, Check] = {
    "keywords:existence": words.has_keywords,
    "keywords:frequency": words.keyword_frequency,
    "keywords:forbidden_words": words.has_no_forbidden_words,
    "keywords:letter_frequency": words.letter_frequency,
    "language:response_language": words.response_language,
    "length_constraints:number_sentences": words.number_sentences,
    "length_constraints:number_paragraphs": form.number_paragraphs,
    "length_constraints:number_words": words.number_words,
    "length_constraints:nth_paragraph_first_word": form.nth_paragraph_first_word,
    "detectable_content:number_placeholders": form.number_placeholders,
    "detectable_content:postscript": form.postscript,
    "detectable_format:number_bullet_lists": form.number_bullet_lists,
    "detectable_format:constrained_response": form.constrained_response,
    "detectable_format:number_highlighted_sections": form.number_highlighted_sections,
    "detectable_format:multiple_sections": form.multiple_sections,
    "detectable_format:json_format": form.json_format,
    "detectable_format:title": form.title,
    "combination:two_responses": form.two_responses,
    "combination:repeat_prompt": form.repeat_prompt,
    "startend:end_checker": form.end_checker,
    "startend:quotation": form.quotation,
    "change_case:capital_word_frequency": words.capital_word_frequency,
    "change_case:english_capital": words.english_capital,
    "change_case:english_lowercase": words.english_lowercase,
    "punctuation:no_comma": words.no_comma,
}

NEEDS_LANGUAGE = frozenset(
    ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
)
"""Types that are not checked without langdetect, whatever the response is: a share of passed
instructions must not depend on which responses could be judged."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of an item: a check and its arguments."""

    id: str
    check: Check
    arguments: Mapping[str, Any]

    @property
    def is_checkable(self) -> bool:
        """Whether this machine has what the check needs."""
        return self.id not in NEEDS_LANGUAGE or is_available()

    def follows(self, response: str) -> bool | None:
        """Return whether a response follows it; None if it is not checkable here."""
        return self.check(response, **self.arguments) if self.is_checkable else None
