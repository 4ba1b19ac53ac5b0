"""IFEval's checks of form: paragraphs, sections, lists, marks, beginning and end.

Each follows the definition in IFEval's program to the letter, including what it does with blank
parts. Patterns that the instruction gives (a section's mark, a postscript's) are regular
expressions.
"""

import json
import re
from typing import Any

from xinslm.evaluate.instructions.base import answered

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""The answers of a constrained response."""
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
_FENCES = ("```json", "```Json", "```JSON", "```")


@answered
def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """There are exactly so many paragraphs with "***" between them; only the first and the last
    part may be blank.
    """
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@answered
def nth_paragraph_first_word(
    response: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """There are exactly so many paragraphs with a blank line between them, and the `nth_paragraph`
    (from 1) begins with a word.
    """
    parts = response.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if count != num_paragraphs or nth_paragraph > count:
        return False
    words = parts[nth_paragraph - 1].split()  # blank parts count here, as in IFEval
    if not words:
        return False
    word = re.split(r"""[.,?!'"]""", words[0].lstrip("'").lstrip('"'))[0]
    return "".join(letter.lower() for letter in word) == first_word.lower()


@answered
def number_placeholders(response: str, num_placeholders: int) -> bool:
    """There are at least so many placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


@answered
def postscript(response: str, postscript_marker: str) -> bool:
    """There is a postscript that begins with a mark, in any case."""
    marker = postscript_marker.strip()
    return bool(re.search(_POSTSCRIPTS.get(marker, marker.lower()), response.lower()))


@answered
def number_bullet_lists(response: str, num_bullets: int) -> bool:
    """There are exactly so many bullet points: lines that begin with "*" or "-"."""
    stars = re.findall(r"^\s*\*[^*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@answered
def constrained_response(response: str) -> bool:
    """One of the three `OPTIONS` is in the response."""
    return any(option in response for option in OPTIONS)


@answered
def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """There are at least so many parts in *one* or **two** asterisks that are not blank.

    A part in two asterisks with a part in one beside it is found by both patterns, as in IFEval.
    """
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(part.strip()) for part in [*single, *double]) >= num_highlights


@answered
def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """There are at least so many sections that begin with a mark and a number."""
    pattern = rf"\s?{section_spliter.strip()}\s?\d+\s?"
    return sum(1 for _ in re.finditer(pattern, response)) >= num_sections


@answered
def json_format(response: str) -> bool:
    """The response is JSON, also in a Markdown block."""
    return parse_json(response)[0]


def parse_json(response: str) -> tuple[bool, Any]:
    """Return whether a response is JSON, also in a Markdown block, and its value."""
    text = response.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        return True, json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False, None


@answered
def title(response: str) -> bool:
    """There is a title in <<double angular brackets>> that is not blank."""
    return any(
        found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", response)
    )


@answered
def two_responses(response: str) -> bool:
    """There are two different answers with "******" between them; only the first and the last part
    may be blank.
    """
    parts = [part.strip() for part in response.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


@answered
def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The response begins with the prompt, in any case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@answered
def end_checker(response: str, end_phrase: str) -> bool:
    """The response ends with a phrase, in any case; quotation marks after it do not count."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@answered
def quotation(response: str) -> bool:
    """The response is in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'
