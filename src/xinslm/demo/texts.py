"""The demo's own texts: prompts for the teacher, questions nobody trained on, and plain paragraphs.

A line of `prompts.txt` may hold `{a|b|c}` and stands for as many prompts as its longest list has
parts; the parts of shorter lists start again from the first.

    expand("Explain {ice|fog} {briefly|to a child}.")  # 2 prompts
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from xinslm.files import write_text

HELD_OUT = 16
"""One prompt in so many is not trained on, more often where that is fewer than `LEAST_HELD_OUT`."""
LEAST_HELD_OUT = 8
_LISTS = re.compile(r"\{([^{}]*)\}")


def expand(line: str) -> list[str]:
    """Return the prompts that a line stands for."""
    lists = [found.split("|") for found in _LISTS.findall(line)]
    count = max((len(parts) for parts in lists), default=1)
    prompts = []
    for index in range(count):
        parts = iter([options[index % len(options)] for options in lists])
        prompts.append(_LISTS.sub(lambda _, parts=parts: next(parts), line))  # type: ignore[misc]
    return prompts


def copy(name: str, folder: Path) -> None:
    """Write a file of this package into a folder."""
    write_text(folder / name, resources.files(__package__).joinpath(name).read_text("utf-8"))


def read_lines(name: str) -> list[str]:
    """Lines of a file of this package, without comments and empty lines."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def prompts(number: int | None = None) -> tuple[list[str], list[str]]:
    """Prompts to train on and prompts to measure on, mixed and always in the same order; only
    `number` in all, if given.
    """
    every = [prompt for line in read_lines("prompts.txt") for prompt in expand(line)]
    random.Random("prompts").shuffle(every)
    every = every[:number]
    step = max(2, min(HELD_OUT, len(every) // LEAST_HELD_OUT))
    train = [prompt for at, prompt in enumerate(every) if at % step]
    return train, every[::step]


def write_chats(path: Path, questions: Iterable[str]) -> None:
    """Write prompts as chats with one user message each."""
    _write(path, ({"messages": [{"role": "user", "content": text}]} for text in questions))


def write_beginnings(path: Path, beginnings: Iterable[str]) -> None:
    """Write the beginnings of texts as documents."""
    _write(path, ({"text": text} for text in beginnings))


def write_paragraphs(path: Path) -> None:
    """Write the plain paragraphs as documents."""
    _write(path, ({"text": text} for text in read_lines("paragraphs.txt")))


def read_answers(path: Path) -> list[tuple[str, str]]:
    """Pairs of prompt and answer in a file that `synthesize` wrote."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [_pair(record) for record in records]


def _pair(record: dict[str, Any]) -> tuple[str, str]:
    if "messages" not in record:
        at = record["prompt_characters"]
        return record["text"][:at], record["text"][at:]
    messages: Sequence[dict[str, str]] = record["messages"]
    return messages[-2]["content"], messages[-1]["content"]


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, "".join(lines))
