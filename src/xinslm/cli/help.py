"""`xinslm COMMAND --help`: usage, an example, the most used options, then the others by group.

Made from the configuration class alone: names and types of its fields, their docstrings, which also
give the units, and their defaults.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from xinslm.cli.groups import GROUP_OF, GROUPS
from xinslm.commands import Command
from xinslm.hints import aliases, alternatives, is_positional, strip_annotated

MOST_USED = "Most used"
EVERY_COMMAND = (
    ("--config FILE", "Read options from a YAML file; flags win over it."),
    ("--debug", "Show the traceback of an error."),
    ("-h, --help", "Show this help."),
)
COLUMN = 28
"""Where the text begins."""
WIDEST = 100
"""Longer lines are hard to read."""


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as `--help` shows it."""

    name: str
    group: str
    flags: str
    """How it is written: '-o, --output-dir PATH'."""
    text: str
    """What it is, with its default."""
    required: bool
    positional: bool

    @property
    def usage(self) -> str:
        """How it is written in the usage line."""
        return self.flags.split(", ")[-1]


def options(cls: type) -> Iterator[Option]:
    """All options of a configuration class, those of the configurations in it included."""
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    for field in dataclasses.fields(cls):
        hint, default = hints[field.name], _default(field)
        if is_dataclass(hint):
            yield from _section(field.name, default, docs[field.name])
            continue
        positional = is_positional(hint)
        group = "Input" if positional else GROUP_OF.get(field.name, "Advanced")
        flags = _flags(field.name, hint, default, positional)
        text = _with_default(docs[field.name], default)
        yield Option(field.name, group, flags, text, default is MISSING, positional)


def _section(name: str, value: Any, title: str) -> Iterator[Option]:
    """Options of a configuration that is a field of another, with the defaults it has there."""
    group = f"Advanced, --{name}.*: {title.rstrip('.')}"
    hints, docs = typing.get_type_hints(type(value), include_extras=True), field_docs(type(value))
    for field in dataclasses.fields(value):
        default, full = getattr(value, field.name), f"{name}.{field.name}"
        flags = _flags(full, hints[field.name], default, positional=False)
        yield Option(full, group, flags, _with_default(docs[field.name], default), False, False)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _flags(name: str, hint: Any, default: Any, positional: bool) -> str:
    """How an option is written on the command line."""
    if positional:
        return name.upper() + (" ..." if _metavar(hint).endswith("...") else "")
    flag = name.replace("_", "-")
    if strip_annotated(hint) is bool:
        return f"--[no-]{flag}" if default else f"--{flag}"
    return ", ".join([*aliases(hint), f"--{flag} {_metavar(hint)}"])


def _metavar(hint: Any) -> str:
    """What stands for a value of this type."""
    if len(members := alternatives(hint)) > 1:
        return "|".join(_metavar(member) for member in members if member is not type(None))
    hint = members[0]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"{_metavar(args[0])} ..."
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    return {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT", bool: "{True,False}"}[hint]


def _with_default(text: str, default: Any) -> str:
    """A field's docstring and its default, where the docstring does not say what happens."""
    if default is MISSING:
        return f"{text} (required)"
    if isinstance(default, bool):
        return f"{text} (default: {'yes' if default else 'no'})"
    if default in (None, "", ()):
        return f"{text} (optional)"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"


def field_docs(cls: type) -> dict[str, str]:
    """Docstrings of the fields of a dataclass and its bases, each as one line."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        statements = typing.cast(ast.ClassDef, body).body
        for field, doc in pairwise(statements):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def render(name: str, command: Command) -> str:
    """The help of a command, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    every = list(options(command.load("config")))
    required = sorted((o for o in every if o.required), key=lambda o: not o.positional)
    usage = " ".join(["usage: xinslm", name, *(o.usage for o in required), "[options]"])
    summary = f"{command.summary[0].upper()}{command.summary[1:]}."
    lines = [
        *textwrap.wrap(usage, width, subsequent_indent="    "),
        "",
        *textwrap.wrap(summary, width),
        "",
        f"example: xinslm {name} {command.example}".rstrip(),
    ]
    most_used = [next(o for o in every if o.name == used) for used in command.most_used.split()]
    lines += _group(MOST_USED, [(o.flags, o.text) for o in most_used], width)
    rest = [o for o in every if o not in most_used]
    for group in dict.fromkeys([*GROUPS, *(o.group for o in rest)]):
        lines += _group(group, [(o.flags, o.text) for o in rest if o.group == group], width)
    return "\n".join([*lines, *_group("Every command", EVERY_COMMAND, width)])


def _group(title: str, rows: typing.Sequence[tuple[str, str]], width: int) -> list[str]:
    """A heading and its options, wrapped; nothing if there are none."""
    lines = ["", f"{title}:"] if rows else []
    for flags, text in rows:
        head = f"  {flags}"
        wrapped = textwrap.wrap(
            re.sub(r"\s+", " ", text), max(width - COLUMN, 24), break_on_hyphens=False
        )
        if len(head) + 2 <= COLUMN:
            head = head.ljust(COLUMN) + wrapped.pop(0)
        lines += [head, *(" " * COLUMN + line for line in wrapped)]
    return lines
