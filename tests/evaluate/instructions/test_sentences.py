"""Sentence borders by hand, and equal to NLTK's Punkt engine with the same word lists."""

import random

import pytest

from xinslm.evaluate.instructions.sentences import ABBREVIATIONS, COMMON, TITLES, split_sentences
from xinslm.evaluate.instructions.words import count_capital_words

MID_SENTENCE_LOWER_CASE = 1 << 5
"""NLTK's flag of a word that was seen in lower case inside a sentence."""
PARTS = """
Mr. Dr. Dr Inc. U.S. e.g. etc. He he The Smith J. It. it a B 1. 2,5 9 ... .. ! ? ?! !!! . , : ; " '
( ) [ ] { } < > ** * - -- ` '' ’ “ ” _ $ @ # % NASA IT'S DON'T CANNOT gonna GONNA 'TIS WE'LL I'M É
n't D'YE MORE'N WANNA LEMME GIMME GOTTA
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("Mr. Smith met Dr. Who. He left.", ["Mr. Smith met Dr. Who.", "He left."]),
        ("He works at Acme Inc. The pay is good.", ["He works at Acme Inc.", "The pay is good."]),
        ("We eat fruit, e.g. Apples.", ["We eat fruit, e.g. Apples."]),
        ("J. S. Bach wrote it.", ["J. S. Bach wrote it."]),
        ("Pi is 3.14 or so.", ["Pi is 3.14 or so."]),
        ("Well... maybe. Well... The end.", ["Well... maybe.", "Well...", "The end."]),
        ('"Stop!" he said. (He did.) Good.', ['"Stop!"', "he said.", "(He did.)", "Good."]),
        ("1. Buy milk.\n2. Eat.", ["1.", "Buy milk.", "2.", "Eat."]),
        ("A heading\n\nA sentence.", ["A heading\n\nA sentence."]),
        ("No end", ["No end"]),
        (" \n", []),
    ],
)
def test_borders(text, expected):
    assert split_sentences(text) == expected


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = PARTS.split()
    parts = words + [" "] * len(words) + ["\n", "\n\n"] * 4
    texts = ("".join(rng.choices(parts, k=rng.randint(1, 16))).strip() for _ in range(count))
    return [text for text in texts if text]


def punkt():
    """NLTK's engine with our lists instead of its trained model."""
    module = pytest.importorskip("nltk.tokenize.punkt")
    parameters = module.PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    parameters.collocations = {(title, word) for title in TITLES for word in COMMON}
    for word in COMMON:
        parameters.ortho_context[word] = MID_SENTENCE_LOWER_CASE
    return module.PunktSentenceTokenizer(parameters)


def test_equal_to_the_engine_of_punkt():
    engine = punkt()
    for text in random_texts(4000, seed=1):
        assert split_sentences(text) == engine.tokenize(text), text


def test_capital_words_equal_to_the_treebank_tokenizer():
    tokenizer = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    for text in random_texts(4000, seed=2):
        tokens = [token for part in split_sentences(text) for token in tokenizer.tokenize(part)]
        assert count_capital_words(text) == sum(map(str.isupper, tokens)), text
