"""The example of `docs/tasks.md` is a task that runs, and its tables list what there is."""

import inspect
import re
from pathlib import Path

from xinslm.evaluate.instructions.custom_checks import CUSTOM_CHECKS
from xinslm.evaluate.instructions.custom_items import KEYS

PAGE = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
ANSWERS = {
    "What is the capital": "Paris.",
    "How many legs": "8",
    "Name three fruits": "pear, plum, fig",
    "Return": '```json\n{"city": "Rome", "country": "Italy"}\n```',
    "Describe a cat": "It purrs and it sleeps.",
    "List the primary": "red yellow blue",
    "Explain to a child": "Because of the air.",
}


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    assert found
    return found[1]


def run(answers: dict[str, str], tmp_path, monkeypatch):
    """Save the page's task and run its program, with an `answer` that knows these answers."""
    (tmp_path / "task.jsonl").write_text(block("json"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def answer(prompt):
        text = prompt[-1]["content"]
        return next(value for start, value in answers.items() if text.startswith(start))

    names = {"answer": answer}
    exec(block("python"), names)
    return names["result"]


def test_the_example_runs_and_right_answers_have_full_marks(tmp_path, monkeypatch, capsys):
    result = run(ANSWERS, tmp_path, monkeypatch)
    assert [row.score for row in result.items] == [1.0] * 6 + [None]
    assert [row.name for row in result.categories] == ["facts", "form", "rules", "open"]
    assert result.not_judged == 1
    assert "overall 7 1.0" in capsys.readouterr().out


def test_wrong_answers_have_none(tmp_path, monkeypatch):
    wrong = dict.fromkeys(ANSWERS, "animal, animal, animal, animal")
    scores = [row.score for row in run(wrong, tmp_path, monkeypatch).items]
    # the third keeps to the number of words, the other parts fail
    assert scores == [0, 0, 0.5, 0, 0, 0, None]


def test_every_check_argument_and_key_is_on_the_page():
    for name, check in CUSTOM_CHECKS.items():
        (line,) = [x for x in PAGE.splitlines() if x.startswith("|") and f"`{name}`" in x]
        for argument in list(inspect.signature(check).parameters)[1:]:
            if argument != "relation":
                assert f"`{argument}`" in line, (name, argument)
    rows = re.findall(r"^\| `(\w+)` \| ", PAGE, re.M)
    assert set(KEYS) <= set(rows)
