"""Every IFEval type on hand-written texts, and on an empty one."""

import pytest

from ifeval_examples import EXAMPLES, LANGUAGE_EXAMPLES
from xinslm.evaluate.instructions import language
from xinslm.evaluate.instructions.checks import CHECKS, Instruction
from xinslm.evaluate.instructions.language import LanguageUnavailableError, is_language
from xinslm.evaluate.instructions.words import count_capital_words, count_words

ALL = EXAMPLES | LANGUAGE_EXAMPLES


def test_there_is_an_example_for_each_of_the_25_types():
    assert len(CHECKS) == 25
    assert set(ALL) == set(CHECKS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_text_follows_and_one_does_not(name):
    arguments, good, bad = EXAMPLES[name]
    assert CHECKS[name](good, **arguments) is True
    assert CHECKS[name](bad, **arguments) is False


@pytest.mark.parametrize("name", LANGUAGE_EXAMPLES)
def test_language(name):
    pytest.importorskip("langdetect")
    arguments, good, bad = LANGUAGE_EXAMPLES[name]
    assert CHECKS[name](good, **arguments) is True
    assert CHECKS[name](bad, **arguments) is False


@pytest.mark.parametrize("response", ["", " \n\t"])
@pytest.mark.parametrize("name", CHECKS)
def test_an_empty_response_follows_nothing(name, response):
    arguments = ALL[name][0]
    assert CHECKS[name](response, **arguments) is False
    # the arguments for which a count of 0 would be enough
    zero = {key: 0 if isinstance(value, int) else value for key, value in arguments.items()}
    assert CHECKS[name](response, **zero) is False


def test_a_zero_is_a_number():
    assert CHECKS["detectable_format:number_bullet_lists"]("No list.", num_bullets=0)
    assert not CHECKS["detectable_format:number_bullet_lists"]("- list", num_bullets=0)


@pytest.mark.parametrize(
    ("relation", "number", "follows"),
    [
        ("at least", 3, True),
        ("at least", 4, False),
        ("less than", 4, True),
        ("less than", 3, False),
    ],
)
def test_both_relations_at_the_border(relation, number, follows):
    check = CHECKS["length_constraints:number_words"]
    assert check("one two three", num_words=number, relation=relation) is follows


def test_a_marker_other_than_the_two_is_searched_in_lower_case():
    check = CHECKS["detectable_content:postscript"]
    assert check("bye\nNB: milk", postscript_marker="NB:")
    assert not check("bye\nP.S. milk", postscript_marker="P.P.S")


def test_words_and_capital_words():
    assert count_words("a_b c-d 3.5 é") == 6
    # NASA, U.S., IT, 'S, A/B, C-D; "Nato" and 5 are none
    assert count_capital_words("NASA (U.S.) IT'S A/B, C-D Nato 5") == 6


def test_without_langdetect_the_three_types_are_not_checked(monkeypatch):
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    for name, (arguments, good, bad) in ALL.items():
        instruction = Instruction(name, CHECKS[name], arguments)
        expected = (None, None) if name in LANGUAGE_EXAMPLES else (True, False)
        assert (instruction.follows(good), instruction.follows(bad)) == expected
    with pytest.raises(LanguageUnavailableError, match="pip install langdetect"):
        is_language("Der Hund", "de")
