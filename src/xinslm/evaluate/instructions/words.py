"""Counts words as IFEval does: runs of letters, digits and "_"; and words in capital letters.

Words in capital letters are tokens of the Penn Treebank's rules, as in NLTK 3.10, that have letters
and no lower-case ones. "DON'T" is two, "DO" and "N'T"; "A/B" and "A-B" are one. Most punctuation is
replaced by spaces instead of being kept as tokens: a token without letters is not counted.
"""

import re

from xinslm.evaluate.instructions.sentences import split_sentences

_OPENING = [
    # opening quotes stay as marks: after them, a full stop is not the sentence's last one
    (re.compile("[«“‘„`]"), r" \g<0> "),
    (re.compile(r"^\"|(?<=[ (\[{<])(?:\"|'')"), " ` "),
    # an apostrophe before a word, unless the word is a clitic
    (re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE), "' "),
]
_PUNCTUATION = [
    (re.compile(r"(?<=[^.])\.[\])}>\"'»”’ ]*+\s*$"), " "),  # the full stop of the sentence
    (re.compile(r"[:,](?!\d)"), " "),
    (re.compile(r"\.{2,}|[;@#$%&\u2012-\u2015?!]"), " "),
    (re.compile(r"(?<=[^'])' "), " ' "),
    (re.compile(r"[*\[\](){}<>]"), " "),
    (re.compile(r"--"), " "),
    (re.compile(r"''|[\"»”’]"), " "),
]
_SUFFIXES = [
    (re.compile(r"([^' ])('[sSmMdD]?) "), r"\1 \2 "),
    (re.compile(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) "), r"\1 \2 "),
    # words of two parts
    (
        re.compile(
            r"\b(can(?=not\b)|d(?='ye\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)"
            r"|more(?='n\b)|wan(?=na\s))(not|'ye|me|na|ta|'n)",
            re.IGNORECASE,
        ),
        r" \1 \2 ",
    ),
    (re.compile(r" ('t)(is|was)\b", re.IGNORECASE), r" \1 \2 "),
]


def count_words(text: str) -> int:
    """Count the runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_capital_words(text: str) -> int:
    """Count the tokens whose letters are all capital."""
    return sum(token.isupper() for sentence in split_sentences(text) for token in _tokens(sentence))


def _tokens(sentence: str) -> list[str]:
    """Return the tokens of one sentence that have letters or digits."""
    for pattern, replacement in [*_OPENING, *_PUNCTUATION]:
        sentence = pattern.sub(replacement, sentence)
    sentence = f" {' '.join(sentence.split())} "
    for pattern, replacement in _SUFFIXES:
        sentence = pattern.sub(replacement, sentence)
    return sentence.split()
