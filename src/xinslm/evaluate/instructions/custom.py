"""Scores answers to a user's own task: by checks, by references, by a judge.

    items = read_items(Path("task.jsonl"))
    result = score(items, [answer(item.prompt) for item in items])
    result.overall.score, result.categories, result.note

The score of an item is between 0 and 1: the mean of the parts that it has. The part of its checks
is the share that the answer passes, that of its references the token F1, and that of the judge
(grade - 1) / 9. An item with a part that could not be checked or judged has no score; it is
counted, and left out of the means.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.instructions import custom_items
from xinslm.evaluate.instructions.answers import exact_match, token_f1
from xinslm.evaluate.instructions.base import Accuracy, accuracy
from xinslm.evaluate.instructions.custom_items import Item
from xinslm.evaluate.instructions.judge import HIGHEST, LOWEST, Judge, Question


@dataclass(frozen=True)
class ItemScore:
    """How one answer did; a part that the item does not have is empty or None."""

    item: Item
    checks: tuple[bool | None, ...]
    """Whether each check passed; None was not checked."""
    exact_match: bool | None
    f1: float | None
    grade: int | None
    """The judge's, 1 to 10; None also if the judge gave none."""

    @property
    def score(self) -> float | None:
        """Mean of the item's parts, 0 to 1; None if one of them could not be scored."""
        if None in self.checks or (self.item.is_judged and self.grade is None):
            return None
        parts = [] if self.f1 is None else [self.f1]
        if self.checks:
            parts.append(sum(map(bool, self.checks)) / len(self.checks))
        if self.grade is not None:
            parts.append((self.grade - LOWEST) / (HIGHEST - LOWEST))
        return statistics.fmean(parts)


@dataclass(frozen=True)
class Summary:
    """Means over a category or over all items; None where nothing was scored."""

    name: str
    items: int
    scored: int
    """Items with a score."""
    score: float | None
    standard_error: float | None
    """Of `score`; None for fewer than two items."""
    checks: Accuracy
    exact_match: float | None
    f1: float | None
    grade: float | None


@dataclass(frozen=True)
class Result:
    """The scores of one model on one task."""

    items: tuple[ItemScore, ...]
    categories: tuple[Summary, ...]
    """In the order in which they first occur."""
    overall: Summary
    not_checked: int
    """Checks that this machine cannot do."""
    not_judged: int
    """Items that were to be judged and have no grade."""

    @property
    def note(self) -> str | None:
        """What was left out, as sentences for the user; None if nothing was."""
        notes = []
        if self.not_checked:
            notes.append(
                f"{self.not_checked} checks were not done: the language of a response needs the "
                "package langdetect (pip install langdetect)."
            )
        if self.not_judged:
            notes.append(
                f"{self.not_judged} answers were not judged: no judge was given, or its reply had "
                "no grade."
            )
        if notes:
            left_out = self.overall.items - self.overall.scored
            notes.append(f"{left_out} of {self.overall.items} items have no score.")
        return " ".join(notes) or None


def read_items(path: Path) -> list[Item]:
    """Read a task from a JSON Lines file; UsageError names file and line."""
    return custom_items.read_items(path)


def score(items: Sequence[Item], responses: Sequence[str], judge: Judge | None = None) -> Result:
    """Score the responses, one for each item in the same order.

    Without a judge, items that need one are counted as not judged. An empty response has the score
    0 and is not sent to the judge.
    """
    if len(items) != len(responses):
        raise UsageError(f"there are {len(items)} items, but {len(responses)} responses")
    if not items:
        raise UsageError("there are no items to score")
    grades = _grades(items, responses, judge)
    scores = tuple(map(_score, items, responses, grades))
    categories = dict.fromkeys(item.category for item in items)
    return Result(
        items=scores,
        categories=tuple(
            _summary(name, [row for row in scores if row.item.category == name])
            for name in categories
        ),
        overall=_summary("overall", scores),
        not_checked=sum(row.checks.count(None) for row in scores),
        not_judged=sum(row.item.is_judged and row.grade is None for row in scores),
    )


def _grades(
    items: Sequence[Item], responses: Sequence[str], judge: Judge | None
) -> list[int | None]:
    """Return the grade of each response; None for those without one."""
    grades: list[int | None] = [
        LOWEST if item.is_judged and not response.strip() else None
        for item, response in zip(items, responses, strict=True)
    ]
    asked = [i for i, item in enumerate(items) if item.is_judged and responses[i].strip()]
    if judge is None or not asked:
        return grades
    questions = [Question(items[i].prompt, responses[i], items[i].references) for i in asked]
    given = judge(questions)
    if len(given) != len(questions):
        raise XinslmError(f"the judge returned {len(given)} grades for {len(questions)} answers")
    for i, grade in zip(asked, given, strict=True):
        grades[i] = grade.value
    return grades


def _score(item: Item, response: str, grade: int | None) -> ItemScore:
    references = item.references
    return ItemScore(
        item=item,
        checks=tuple(check.follows(response) for check in item.checks),
        exact_match=exact_match(response, references) if references else None,
        f1=token_f1(response, references) if references else None,
        grade=grade,
    )


def _summary(name: str, rows: Sequence[ItemScore]) -> Summary:
    scores = [row.score for row in rows if row.score is not None]
    many = len(scores) > 1
    return Summary(
        name=name,
        items=len(rows),
        scored=len(scores),
        score=_mean(scores),
        standard_error=statistics.stdev(scores) / len(scores) ** 0.5 if many else None,
        checks=accuracy([passed for row in rows for passed in row.checks]),
        exact_match=_mean(row.exact_match for row in rows),
        f1=_mean(row.f1 for row in rows),
        grade=_mean(row.grade for row in rows),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
