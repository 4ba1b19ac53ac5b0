"""A user's own task: reading, every check, references, the judge's part, means by hand."""

import json

import pytest

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.instructions import language
from xinslm.evaluate.instructions.answers import exact_match, normalize, token_f1
from xinslm.evaluate.instructions.base import Accuracy
from xinslm.evaluate.instructions.custom import read_items, score
from xinslm.evaluate.instructions.custom_checks import CUSTOM_CHECKS
from xinslm.evaluate.instructions.judge import Grade


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def item(**more):
    return {"prompt": "Go.", **more}


def test_prompts_are_messages(tmp_path):
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    path = write(
        tmp_path / "a.jsonl",
        item(reference="x"),
        {"messages": chat, "judge": True, "category": "c"},
    )
    first, second = read_items(path)
    assert first.prompt == ({"role": "user", "content": "Go."},)
    assert second.prompt == tuple(chat)
    assert (first.references, first.is_judged, first.category) == (("x",), False, "uncategorized")
    assert (second.references, second.is_judged, second.category) == ((), True, "c")
    assert second.source == f"{path}:2"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (item(), "nothing says how to score"),
        ({"checks": [{"id": "contains", "text": "x"}]}, "either 'prompt' or 'messages'"),
        (item(messages=[], judge=True), "either 'prompt' or 'messages'"),
        (item(judge="yes"), "'judge' must be true or false"),
        (item(referense="x"), "Did you mean 'reference'"),
        (item(reference=[]), "'reference' must be"),
        (item(reference=["x", 3]), "'reference' must be text"),
        (item(checks=[]), "'checks' must be a list"),
        (item(checks=["contains"]), "checks[0] must be an object with an 'id'"),
        (item(checks=[{"id": "max_word", "words": 3}]), "Did you mean 'max_words'"),
        (item(checks=[{"id": "max_words", "words": "3"}]), "whole number"),
        (item(checks=[{"id": "regex", "pattern": "["}]), "not a regular expression"),
        (item(checks=[{"id": "contains", "word": "x"}]), "no argument 'word'. It takes text"),
        (item(checks=[{"id": "contains"}]), "needs the argument 'text'"),
        ({"messages": [{"role": "user"}], "judge": True}, "messages[0]: 'content' must be text"),
        ({"messages": [{"role": "bot", "content": "x"}], "judge": True}, "role must be one of"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "judge": True},
            "last message must be the user's",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "a.jsonl", item(judge=True), bad)
    with pytest.raises(UsageError) as caught:
        read_items(path)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        ("contains", {"text": "C++."}, "I like C++.", "I like c++."),
        ("not_contains", {"text": "cat"}, "A Cat.", "A cat."),
        ("regex", {"pattern": r"^\d+$"}, " 42\n", "42 is it"),
        ("equals", {"text": "The Nile"}, "nile.", "nile river"),
        ("json", {}, "```\n[1]\n```", "[1"),
        ("json", {"required": ["a"]}, '{"a": 1, "b": 2}', '["a"]'),
        ("max_words", {"words": 2}, "two words", "three words here"),
        ("min_words", {"words": 3}, "three words here", "two words"),
    ],
)
def test_checks(name, arguments, good, bad):
    check = CUSTOM_CHECKS[name]
    assert check(good, **arguments) is True
    assert check(bad, **arguments) is False
    assert check(" ", **arguments) is False


@pytest.mark.parametrize(
    ("response", "references", "exact", "f1"),
    [
        ("The Nile!", ["nile"], True, 1.0),
        # 1 of 3 words is right, 1 of 1 is found: 2 * (1/3) * 1 / (1/3 + 1)
        ("It is the Nile", ["Nile"], False, 0.5),
        ("four", ["five", "4", "Four."], True, 1.0),  # the best of several
        ("red red", ["red red red blue"], False, 2 * 2 / 6),  # repeated words count so often
        ("no idea", ["Nile"], False, 0.0),
        ("", ["Nile"], False, 0.0),
        ("A.", ["A"], True, 1.0),  # an article alone is an answer
        ("B", ["A"], False, 0.0),
        ("+", ["+"], True, 1.0),
        ("-", ["+"], False, 0.0),
    ],
)
def test_references(response, references, exact, f1):
    assert exact_match(response, references) is exact
    assert token_f1(response, references) == pytest.approx(f1)


def test_normalized_text():
    # "an" goes, "another" stays; a hyphen joins, as in SQuAD's program
    assert normalize("An  Old-Timer, the another's") == "oldtimer anothers"


def test_scores_and_means(tmp_path):
    checks = [{"id": "contains", "text": "x"}, {"id": "max_words", "words": 2}]
    path = write(
        tmp_path / "a.jsonl",
        item(checks=checks, category="a"),
        item(reference="x y", category="a"),
        item(checks=checks, reference="x", judge=True, category="b"),
    )
    asked = []

    def judge(questions):
        asked.extend(questions)
        return [Grade(7, "...")] * len(questions)

    result = score(read_items(path), ["a b c x", "x", "x"], judge)
    # 1 of 2 checks; F1 of x with x y: 2 * 1 / 3; the mean of 1, 1 and 6 / 9
    expected = [1 / 2, 2 / 3, (1 + 1 + 6 / 9) / 3]
    assert [row.score for row in result.items] == pytest.approx(expected)
    assert [question.response for question in asked] == ["x"]
    first, second = result.categories
    assert (first.name, first.items, second.name, second.items) == ("a", 2, "b", 1)
    assert first.score == pytest.approx(sum(expected[:2]) / 2)
    assert first.standard_error == pytest.approx((2 / 3 - 1 / 2) / 2)
    assert (first.checks, second.checks) == (Accuracy(1, 2), Accuracy(2, 2))
    assert (second.grade, second.exact_match, second.standard_error) == (7, 1.0, None)
    assert result.overall.score == pytest.approx(sum(expected) / 3)
    assert result.note is None


def test_what_is_not_judged_has_no_score(tmp_path):
    path = write(tmp_path / "a.jsonl", item(judge=True, reference="x"), item(reference="x"))
    items = read_items(path)
    without = score(items, ["x", "y"])
    unread = score(items, ["x", "y"], lambda questions: [Grade(None, "?")])
    for result in (without, unread):
        assert [row.score for row in result.items] == [None, 0.0]
        assert (result.not_judged, result.overall.scored, result.overall.score) == (1, 1, 0.0)
        assert "1 answers were not judged" in result.note
        assert "1 of 2 items have no score" in result.note
    with pytest.raises(XinslmError, match="2 grades for 1 answers"):
        score(items, ["x", "y"], lambda questions: [Grade(1, "")] * 2)


def test_what_is_not_checked_has_no_score(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    checks = [{"id": "language:response_language", "language": "de"}]
    result = score(read_items(write(tmp_path / "a.jsonl", item(checks=checks))), ["Der Hund"])
    assert (result.items[0].score, result.not_checked, result.overall.score) == (None, 1, None)
    assert "1 checks were not done" in result.note


def test_an_empty_answer_has_the_score_0(tmp_path):
    checks = [{"id": "not_contains", "text": "x"}, {"id": "max_words", "words": 9}]
    path = write(tmp_path / "a.jsonl", item(checks=checks, reference="a", judge=True))

    def judge(questions):
        raise AssertionError("an empty answer needs no judge")

    assert score(read_items(path), [" \n"], judge).items[0].score == 0.0
