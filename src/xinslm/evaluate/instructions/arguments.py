"""Reads the arguments of a check from a file, strictly: the names and types are the function's.

A null is an argument that was left out: the published IFEval file has every name in every row. A 0
is a 0.
"""

import difflib
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from xinslm.errors import UsageError
from xinslm.evaluate.instructions.base import Check
from xinslm.evaluate.instructions.checks import Instruction
from xinslm.evaluate.instructions.language import LANGUAGES

PATTERNS = frozenset(
    ("keyword", "keywords", "forbidden_words", "section_spliter", "postscript_marker", "pattern")
)
"""Arguments that are regular expressions."""


def read_instruction(
    check_id: Any, arguments: Any, checks: Mapping[str, Check], where: str
) -> Instruction:
    """Look up a check and bind its arguments; UsageError says at `where` what is wrong."""
    if not isinstance(check_id, str) or check_id not in checks:
        near = nearest(str(check_id), list(checks))
        raise UsageError(f"{where}: there is no check {check_id!r}.{near}")
    if not isinstance(arguments, Mapping):
        raise UsageError(f"{where}: the arguments of {check_id} must be an object")
    given = {name: value for name, value in arguments.items() if value is not None}
    check = checks[check_id]
    where = f"{where}: {check_id}"
    types = typing.get_type_hints(inspect.unwrap(check))
    parameters = list(inspect.signature(check).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    for name in sorted(given.keys() - set(names)):
        takes = f"It takes {', '.join(names)}" if names else "It takes no arguments"
        raise UsageError(f"{where} has no argument {name!r}. {takes}.{nearest(name, names)}")
    for parameter in parameters:
        if parameter.name in given:
            kind = types[parameter.name]
            given[parameter.name] = _value(given[parameter.name], kind, parameter.name, where)
        elif parameter.default is inspect.Parameter.empty:
            raise UsageError(f"{where} needs the argument {parameter.name!r}")
    _require_sense(given, where)
    return Instruction(check_id, check, given)


def nearest(word: str, words: list[str]) -> str:
    """Suggest the most similar of some names, as a sentence that begins with a space.

    The last part of an id counts, too: "existence" is near "keywords:existence".
    """
    short = {name.rpartition(":")[2]: name for name in words}
    near = difflib.get_close_matches(word, words, n=1)
    near = near or [short[name] for name in difflib.get_close_matches(word, short, n=1)]
    return f" Did you mean {near[0]!r}?" if near else ""


def _value(value: Any, kind: Any, name: str, where: str) -> Any:
    """Return a value that has the type of the parameter."""
    if kind is int:
        return _count(value, name, where)
    if typing.get_origin(kind) is Literal:
        options = typing.get_args(kind)
        if value not in options:
            raise UsageError(f"{where}: {name} must be one of {options}, but is {value!r}")
        return value
    is_list = kind is not str
    texts = value if is_list else [value]
    if not isinstance(texts, list) or not texts:
        raise UsageError(f"{where}: {name} must be a list of strings, but is {value!r}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{where}: {name} must be text that is not blank, but is {text!r}")
        if name in PATTERNS:
            _require_pattern(text, name, where)
    return list(texts) if is_list else value


def _count(value: Any, name: str, where: str) -> int:
    # tables that were saved with missing values hold 3 as 3.0
    is_whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, int) or is_whole) or value < 0:
        raise UsageError(f"{where}: {name} must be a whole number from 0, but is {value!r}")
    return int(value)


def _require_pattern(text: str, name: str, where: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise UsageError(
            f"{where}: {name} {text!r} is not a regular expression ({error}); write a backslash "
            "before a character that is meant literally"
        ) from None


def _require_sense(given: Mapping[str, Any], where: str) -> None:
    """Refuse values that the harness would replace by random ones, and unknown languages."""
    if "letter" in given and len(given["letter"].strip()) != 1:
        raise UsageError(f"{where}: letter must be one character, but is {given['letter']!r}")
    if "language" in given and given["language"] not in LANGUAGES:
        raise UsageError(
            f"{where}: language {given['language']!r} is not one of {', '.join(sorted(LANGUAGES))}"
        )
    if "nth_paragraph" in given and not 1 <= given["nth_paragraph"] <= given["num_paragraphs"]:
        raise UsageError(
            f"{where}: nth_paragraph must be from 1 to num_paragraphs, but is "
            f"{given['nth_paragraph']} of {given['num_paragraphs']}"
        )
