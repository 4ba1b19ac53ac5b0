"""IFEval: 541 prompts with 834 instructions that a program can check (arXiv:2311.07911).

    items = read_items(Path("ifeval.jsonl"))
    result = score(items, [answer(item.prompt) for item in items])
    result.prompt_strict.rate, result.instruction_loose.rate, result.note

Strict looks at the response as it is. Loose takes an instruction as followed if any of eight forms
of the response follows it: without asterisks, without the first line, the last one, or both.
Accuracy is the mean over prompts (all instructions followed) and over instructions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError
from xinslm.evaluate.instructions.arguments import read_instruction
from xinslm.evaluate.instructions.base import Accuracy, accuracy
from xinslm.evaluate.instructions.checks import CHECKS, Instruction
from xinslm.evaluate.instructions.records import read_objects, require_keys, require_text

KEYS = ("key", "prompt", "instruction_id_list", "kwargs")


@dataclass(frozen=True)
class Item:
    """One prompt and its instructions."""

    key: Any
    """The file's own number of the prompt."""
    text: str
    instructions: tuple[Instruction, ...]

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The messages for a chat model."""
        return ({"role": "user", "content": self.text},)


@dataclass(frozen=True)
class ItemResult:
    """Which instructions of one item were followed; None was not checked."""

    key: Any
    strict: tuple[bool | None, ...]
    loose: tuple[bool | None, ...]


@dataclass(frozen=True)
class TypeResult:
    """One row of the table of instruction types."""

    id: str
    strict: Accuracy
    loose: Accuracy
    not_checked: int


@dataclass(frozen=True)
class Result:
    """Accuracy of one model. A prompt with an instruction that was not checked is left out."""

    prompt_strict: Accuracy
    prompt_loose: Accuracy
    instruction_strict: Accuracy
    instruction_loose: Accuracy
    types: tuple[TypeResult, ...]
    """In the order of `CHECKS`, those that occur."""
    items: tuple[ItemResult, ...]
    not_checked: int
    """Instructions."""
    prompts_left_out: int

    @property
    def note(self) -> str | None:
        """What was not checked, as a sentence for the user; None if all was."""
        if not self.not_checked:
            return None
        total = self.not_checked + self.instruction_strict.checked
        return (
            f"{self.not_checked} of {total} instructions were not checked, and "
            f"{self.prompts_left_out} of {len(self.items)} prompts are left out of the accuracy: "
            "the language of a response needs the package langdetect (pip install langdetect)"
        )


def read_items(path: Path) -> list[Item]:
    """Read the official file, one prompt a line; UsageError names file and line."""
    return [_item(record, where) for where, record in read_objects(Path(path))]


def _item(record: dict[str, Any], where: str) -> Item:
    require_keys(record, KEYS, where)
    text = require_text(record, "prompt", where)
    ids, arguments = record.get("instruction_id_list"), record.get("kwargs")
    if not isinstance(ids, list) or not ids:
        raise UsageError(f"{where}: 'instruction_id_list' must be a list of ids, but is {ids!r}")
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise UsageError(
            f"{where}: 'kwargs' must be a list of {len(ids)} objects, one for each id in "
            "'instruction_id_list'"
        )
    instructions = (
        read_instruction(check_id, given, CHECKS, where)
        for check_id, given in zip(ids, arguments, strict=True)
    )
    return Item(record.get("key"), text, tuple(instructions))


def loose_forms(response: str) -> list[str]:
    """Return the eight forms of a response that the loose accuracy looks at, each once."""
    lines = response.split("\n")
    parts = [lines[1:], lines[:-1], lines[1:-1]]
    forms = [response, *("\n".join(part).strip() for part in parts)]
    return list(dict.fromkeys([*forms, *(form.replace("*", "") for form in forms)]))


def score(items: Sequence[Item], responses: Sequence[str]) -> Result:
    """Check the responses, one for each item in the same order."""
    if len(items) != len(responses):
        raise UsageError(f"there are {len(items)} items, but {len(responses)} responses")
    results = tuple(map(_check, items, responses))
    followed: dict[str, list[tuple[bool | None, bool | None]]] = {}
    for item, result in zip(items, results, strict=True):
        for instruction, strict, loose in zip(
            item.instructions, result.strict, result.loose, strict=True
        ):
            followed.setdefault(instruction.id, []).append((strict, loose))
    pairs = [pair for rows in followed.values() for pair in rows]
    strict_prompts = accuracy([_all(result.strict) for result in results])
    return Result(
        prompt_strict=strict_prompts,
        prompt_loose=accuracy([_all(result.loose) for result in results]),
        instruction_strict=accuracy([strict for strict, _ in pairs]),
        instruction_loose=accuracy([loose for _, loose in pairs]),
        types=tuple(_type(name, followed[name]) for name in CHECKS if name in followed),
        items=results,
        not_checked=sum(strict is None for strict, _ in pairs),
        prompts_left_out=len(results) - strict_prompts.checked,
    )


def _check(item: Item, response: str) -> ItemResult:
    forms = loose_forms(response)
    strict, loose = [], []
    for instruction in item.instructions:
        followed = instruction.follows(response)
        strict.append(followed)
        loose.append(
            followed if followed is None else any(instruction.follows(form) for form in forms)
        )
    return ItemResult(item.key, tuple(strict), tuple(loose))


def _all(followed: tuple[bool | None, ...]) -> bool | None:
    """Return whether all were followed; None if one was not checked."""
    return None if None in followed else all(followed)


def _type(name: str, rows: list[tuple[bool | None, bool | None]]) -> TypeResult:
    strict, loose = (accuracy(column) for column in zip(*rows, strict=True))
    return TypeResult(name, strict, loose, len(rows) - strict.checked)
