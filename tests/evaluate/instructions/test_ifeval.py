"""Reading the official file, the eight loose forms, accuracies and the table, by hand."""

import json

import pytest

from xinslm.errors import UsageError
from xinslm.evaluate.instructions import language
from xinslm.evaluate.instructions.base import Accuracy
from xinslm.evaluate.instructions.ifeval import loose_forms, read_items, score

COMMA, TITLE = "punctuation:no_comma", "detectable_format:title"
LOWER, WORDS = "change_case:english_lowercase", "length_constraints:number_words"


def row(key=1, ids=(COMMA,), kwargs=None, **more):
    kwargs = [{} for _ in ids] if kwargs is None else kwargs
    return {"key": key, "prompt": "Go.", "instruction_id_list": list(ids), "kwargs": kwargs, **more}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompt_and_arguments_without_nulls(tmp_path):
    kwargs = [{"num_words": 0, "relation": "at least", "letter": None}, {"num_words": None}]
    (item,) = read_items(write(tmp_path / "a.jsonl", row(ids=(WORDS, COMMA), kwargs=kwargs)))
    assert item.prompt == ({"role": "user", "content": "Go."},)
    # a 0 stays, a null goes
    assert item.instructions[0].arguments == {"num_words": 0, "relation": "at least"}
    assert item.instructions[1].arguments == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(ids=("keywords:existance",)), "Did you mean 'keywords:existence'"),
        (row(ids=("existence",)), "Did you mean 'keywords:existence'"),
        (row(ids=(WORDS,)), "needs the argument 'num_words'"),
        (row(kwargs=[{"num_word": 1}]), "no argument 'num_word'. It takes no arguments"),
        (row(ids=(WORDS,), kwargs=[{"num_words": -1, "relation": "at least"}]), "whole number"),
        (row(ids=(WORDS,), kwargs=[{"num_words": True, "relation": "at least"}]), "whole number"),
        (row(ids=(WORDS,), kwargs=[{"num_words": 3, "relation": "at most"}]), "one of"),
        (row(ids=("keywords:existence",), kwargs=[{"keywords": "x"}]), "list of strings"),
        (row(ids=("keywords:existence",), kwargs=[{"keywords": ["("]}]), "regular expression"),
        (row(ids=("language:response_language",), kwargs=[{"language": "german"}]), "not one of"),
        (row(kwargs=[]), "list of 1 objects"),
        (row(prompt=" "), "'prompt' must be text"),
        (row(promt="x"), "unknown key 'promt'. Did you mean 'prompt'"),
        (
            row(
                ids=("length_constraints:nth_paragraph_first_word",),
                kwargs=[{"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}],
            ),
            "from 1 to num_paragraphs",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "a.jsonl", row(), bad)
    with pytest.raises(UsageError) as caught:
        read_items(path)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"key": 1,', "a.jsonl:1: not valid JSON"),
        (b"\n[1]\n", "a.jsonl:2: a line must be an object"),
        (b"\n\xff\n", "a.jsonl:2: byte 0 of the line is not UTF-8"),
        (b"\n \n", "there are no items"),
    ],
)
def test_files_that_are_not_json_lines(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_items(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_items(tmp_path / "b.jsonl")


def test_loose_forms():
    assert set(loose_forms("*a\nb\nc*")) == {
        "*a\nb\nc*", "b\nc*", "*a\nb", "b", "a\nb\nc", "b\nc", "a\nb",
    }  # fmt: off
    # one line: without it nothing is left
    assert loose_forms("a") == ["a", ""]


@pytest.mark.parametrize(
    ("response", "strict", "loose"),
    [
        ("Sure, here it is:\nyes", False, True),  # first line
        ("yes\nAnything else, sir?", False, True),  # last line
        ("Sure, here:\nyes\nAnything else, sir?", False, True),  # both
        ("yes, sir", False, False),
        ("", False, False),
        ("a,\n\n", False, False),  # the other lines are blank: no form of it is an answer
    ],
)
def test_strict_and_loose(tmp_path, response, strict, loose):
    items = read_items(write(tmp_path / "a.jsonl", row()))
    (result,) = score(items, [response]).items
    assert (result.strict, result.loose) == ((strict,), (loose,))


def test_asterisks_are_removed_in_the_loose_forms(tmp_path):
    quote = "startend:quotation"
    items = read_items(write(tmp_path / "a.jsonl", row(ids=(quote,))))
    (result,) = score(items, ['Sure:\n**"yes"**']).items
    assert (result.strict, result.loose) == ((False,), (True,))


def test_accuracies_and_table(tmp_path):
    items = read_items(write(tmp_path / "a.jsonl", row(), row(2, (COMMA, TITLE)), row(3, (TITLE,))))
    # strict: [yes], [yes, no], [yes]; loose: the title's line may not go, so the same
    result = score(items, ["yes", "no title", "<<A, B>>"])
    assert result.prompt_strict == Accuracy(2, 3)
    assert result.instruction_strict == Accuracy(3, 4)
    assert result.prompt_strict.rate == 2 / 3
    assert [(row.id, row.strict) for row in result.types] == [
        (TITLE, Accuracy(1, 2)),
        (COMMA, Accuracy(2, 2)),
    ]
    assert result.note is None
    with pytest.raises(UsageError, match="3 items, but 1 responses"):
        score(items, ["yes"])


def test_what_is_not_checked_is_left_out_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    items = read_items(write(tmp_path / "a.jsonl", row(), row(2, (COMMA, LOWER)), row(3, (LOWER,))))
    result = score(items, ["a, b", "a, b", "A"])
    assert result.prompt_strict == Accuracy(0, 1)
    assert result.instruction_loose == Accuracy(0, 2)
    assert (result.not_checked, result.prompts_left_out) == (2, 2)
    assert "2 of 4 instructions were not checked, and 2 of 3 prompts" in result.note
    assert next(row for row in result.types if row.id == LOWER).strict.rate is None


def test_the_official_file(shared_data):
    path = shared_data / "bench" / "ifeval.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} not found")
    items = read_items(path)
    # the paper's 25 types; 541 prompts, 834 instructions
    assert len(items) == 541
    assert sum(len(item.instructions) for item in items) == 834
    assert len({i.id for item in items for i in item.instructions}) == 25
    # without answers nothing is followed, except that it is not checked
    result = score(items, [""] * 541)
    assert result.prompt_loose.right == result.instruction_loose.right == 0
