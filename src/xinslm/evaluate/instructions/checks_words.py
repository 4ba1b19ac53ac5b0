"""IFEval's checks of words and letters: keywords, lengths, language, case, punctuation.

Keywords are regular expressions and match inside words, as in IFEval ("rock" is found in
"rocket"); forbidden words match between word boundaries only.
"""

import re

from xinslm.evaluate.instructions.base import Relation, answered, holds
from xinslm.evaluate.instructions.language import is_language
from xinslm.evaluate.instructions.sentences import split_sentences
from xinslm.evaluate.instructions.words import count_capital_words, count_words


@answered
def has_keywords(response: str, keywords: list[str]) -> bool:
    """Every keyword occurs, in any case."""
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in keywords)


@answered
def keyword_frequency(response: str, keyword: str, frequency: int, relation: Relation) -> bool:
    """A keyword occurs less than, or at least, `frequency` times, in any case."""
    found = re.findall(keyword.strip(), response, re.IGNORECASE)
    return holds(len(found), relation, frequency)


@answered
def has_no_forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    """None of the words occurs, in any case."""
    return not any(re.search(rf"\b{word}\b", response, re.IGNORECASE) for word in forbidden_words)


@answered
def letter_frequency(
    response: str, letter: str, let_frequency: int, let_relation: Relation
) -> bool:
    """A letter occurs less than, or at least, `let_frequency` times, in any case.

    Other characters are counted like letters. The harness draws a random letter instead; this
    concerns two of IFEval's 541 prompts, with "!" and "#".
    """
    return holds(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


@answered
def response_language(response: str, language: str) -> bool:
    """The response is in a language, an ISO 639-1 code."""
    return is_language(response, language)


@answered
def number_sentences(response: str, num_sentences: int, relation: Relation) -> bool:
    """There are less than, or at least, `num_sentences` sentences; see `split_sentences`."""
    return holds(len(split_sentences(response)), relation, num_sentences)


@answered
def number_words(response: str, num_words: int, relation: Relation) -> bool:
    """There are less than, or at least, `num_words` words."""
    return holds(count_words(response), relation, num_words)


@answered
def capital_word_frequency(
    response: str, capital_frequency: int, capital_relation: Relation
) -> bool:
    """Less than, or at least, `capital_frequency` words are in capital letters."""
    return holds(count_capital_words(response), capital_relation, capital_frequency)


@answered
def english_capital(response: str) -> bool:
    """The response is English and in capital letters."""
    return response.isupper() and is_language(response, "en")


@answered
def english_lowercase(response: str) -> bool:
    """The response is English and has no capital letters."""
    return response.islower() and is_language(response, "en")


@answered
def no_comma(response: str) -> bool:
    """There is no comma."""
    return "," not in response
