"""Type hints of configurations: how a field is written on the command line, and its value from a
word, in the same terms for flags and YAML.

    model: Annotated[Path, POSITIONAL]
    output_dir: Annotated[Path, Alias("-o")]
"""

import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

POSITIONAL = "positional"
"""Marks a field that is an argument without a flag."""


class Alias(NamedTuple):
    """Marks a field with a second, short flag."""

    flag: str


def is_positional(hint: Any) -> bool:
    """Whether a hint, with its marks, is of an argument without a flag."""
    return POSITIONAL in getattr(hint, "__metadata__", ())


def aliases(hint: Any) -> list[str]:
    """Further flags of a hint with its marks."""
    return [mark.flag for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Alias)]


def strip_annotated(hint: Any) -> Any:
    """Reduce `Annotated[X, ...]` to X, also inside a union."""
    return (
        strip_annotated(typing.get_args(hint)[0])
        if typing.get_origin(hint) is typing.Annotated
        else hint
    )


def alternatives(hint: Any) -> list[Any]:
    """The members of a union, without marks; any other hint alone."""
    hint = strip_annotated(hint)
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return [strip_annotated(member) for member in typing.get_args(hint)] if is_union else [hint]


def to_value(hint: Any, text: str) -> Any:
    """Turn a word into what `hint` (neither a union nor a tuple) asks for, or raise ValueError
    saying what it must be.
    """
    if typing.get_origin(hint) is Literal:
        choices = [str(choice) for choice in typing.get_args(hint)]
        if text in choices:
            return text
        raise ValueError(
            f"is '{text}', but must be one of {', '.join(choices)}{did_you_mean(text, choices)}"
        )
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"is '{text}', but must be true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            what = "an integer" if hint is int else "a number"
            raise ValueError(f"is '{text}', but must be {what}") from None
    if hint is Path and not text:
        raise ValueError("is empty, but must be a path")
    return Path(text) if hint is Path else text


def did_you_mean(word: str, known: list[str], cutoff: float = 0.6) -> str:
    """'. Did you mean ...?' with the nearest of the known words; empty if none is near."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f". Did you mean '{near[0]}'?" if near else ""
