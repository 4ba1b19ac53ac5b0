"""Reads a user's own task: a JSON Lines file with one item a line.

    {"prompt": "...", "checks": [{"id": "contains", "text": "Paris"}], "category": "facts"}
    {"messages": [{"role": "user", "content": "..."}], "reference": ["four", "4"]}
    {"prompt": "...", "judge": true}

An item needs one of "checks", "reference" and "judge", and may have all. `docs/tasks.md` is the
guide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError
from xinslm.evaluate.instructions.arguments import read_instruction
from xinslm.evaluate.instructions.checks import Instruction
from xinslm.evaluate.instructions.custom_checks import CUSTOM_CHECKS
from xinslm.evaluate.instructions.records import read_objects, require_keys, require_text

KEYS = ("prompt", "messages", "checks", "reference", "judge", "category")
ROLES = ("system", "user", "assistant")
NO_CATEGORY = "uncategorized"


@dataclass(frozen=True)
class Item:
    """One prompt and how an answer to it is scored."""

    source: str
    """File and line, for messages."""
    prompt: tuple[dict[str, str], ...]
    """The messages for a chat model; the last is the user's."""
    checks: tuple[Instruction, ...]
    references: tuple[str, ...]
    is_judged: bool
    category: str


def read_items(path: Path) -> list[Item]:
    """Read a task; UsageError names file and line."""
    return [_item(record, where) for where, record in read_objects(Path(path))]


def _item(record: dict[str, Any], where: str) -> Item:
    require_keys(record, KEYS, where)
    if ("prompt" in record) == ("messages" in record):
        raise UsageError(f"{where}: an item needs either 'prompt' or 'messages'")
    judge = record.get("judge", False)
    if not isinstance(judge, bool):
        raise UsageError(f"{where}: 'judge' must be true or false, but is {judge!r}")
    if not judge and "checks" not in record and "reference" not in record:
        raise UsageError(
            f"{where}: nothing says how to score an answer; give 'checks', 'reference' or "
            '"judge": true'
        )
    category = require_text(record, "category", where) if "category" in record else NO_CATEGORY
    return Item(
        source=where,
        prompt=_prompt(record, where),
        checks=_checks(record["checks"], where) if "checks" in record else (),
        references=_references(record["reference"], where) if "reference" in record else (),
        is_judged=judge,
        category=category.strip(),
    )


def _prompt(record: dict[str, Any], where: str) -> tuple[dict[str, str], ...]:
    if "prompt" in record:
        return ({"role": "user", "content": require_text(record, "prompt", where)},)
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: 'messages' must be a list of messages, but is {messages!r:.80}")
    for index, message in enumerate(messages):
        place = f"{where}: messages[{index}]"
        if not isinstance(message, Mapping):
            raise UsageError(f"{place} must be an object, but is {message!r:.80}")
        require_keys(message, ("role", "content"), place)
        if message.get("role") not in ROLES:
            raise UsageError(f"{place}: the role must be one of {', '.join(ROLES)}")
        require_text(message, "content", place)
    if messages[-1]["role"] != "user":
        raise UsageError(f"{where}: the last message must be the user's; the model answers it")
    return tuple(dict(message) for message in messages)


def _checks(value: Any, where: str) -> tuple[Instruction, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: 'checks' must be a list of checks, but is {value!r:.80}")
    checks = []
    for index, check in enumerate(value):
        place = f"{where}: checks[{index}]"
        if not isinstance(check, Mapping) or "id" not in check:
            raise UsageError(f"{place} must be an object with an 'id', but is {check!r:.80}")
        arguments = {name: given for name, given in check.items() if name != "id"}
        checks.append(read_instruction(check["id"], arguments, CUSTOM_CHECKS, place))
    return tuple(checks)


def _references(value: Any, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise UsageError(f"{where}: 'reference' must be an answer or a list of answers")
    return tuple(require_text({"reference": text}, "reference", where) for text in texts)
