"""The arguments of a command: its configuration from words, by the fields of its class.

    parse(DistillConfig, ["--data-path", "data", "-o", "model", "--loss.alpha=0.4"])

`--flag value` and `--flag=value` are the same, and so are `-` and `_` in a name. A flag of a tuple
takes all words up to the next flag (after `=` only that one); the last of two equal flags counts;
`None` is a value of a field that may be None; after `--` no word is a flag.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from typing import Any

from xinslm.errors import UsageError
from xinslm.hints import aliases, alternatives, did_you_mean, is_positional, to_value


@dataclass(frozen=True)
class Argument:
    """One field of a configuration or of a configuration in it."""

    name: str
    """Names of the fields on the way to it, with dots between."""
    hints: list[Any]
    """What its value may be; more than one if it may be None."""
    positional: bool
    flags: list[str]
    """How it is written, the shortest first."""

    @property
    def shown(self) -> str:
        """How messages call it."""
        return self.name.upper() if self.positional else self.flags[-1]

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone is the value."""
        return self.hints == [bool]

    @property
    def is_tuple(self) -> bool:
        """Whether it takes any number of words."""
        return any(typing.get_origin(hint) is tuple for hint in self.hints)

    def value(self, words: Sequence[str]) -> Any:
        """Its value from words; ValueError says what they must be."""
        if list(words) == ["None"] and type(None) in self.hints:
            return None
        (hint,) = (hint for hint in self.hints if hint is not type(None))
        if self.is_tuple:
            kind = typing.get_args(hint)[0]
            return tuple(to_value(kind, word) for word in words)
        return to_value(hint, words[0])


def arguments(cls: type, prefix: str = "") -> Iterator[Argument]:
    """All arguments of a configuration class, those of the configurations in it included."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if is_dataclass(hint):
            yield from arguments(typing.cast(type, hint), f"{prefix}{name}.")
            continue
        full = f"{prefix}{name}"
        flags = [*aliases(hint), f"--{full.replace('_', '-')}"]
        yield Argument(full, alternatives(hint), is_positional(hint), flags)


def parse(cls: type, words: Sequence[str], given: Any = None) -> Any:
    """Make a configuration from words, over what `given` has: an instance of `cls` in which
    MISSING stands for what is still needed. UsageError names all words that are wrong.
    """
    reading = _Reading(list(arguments(cls)))
    reading.read(list(words))
    config = _build(cls, reading.values, given, "")
    errors = reading.errors or _missing(config, reading.known)
    if errors:
        raise UsageError("\n".join(errors))
    return config


class _Reading:
    """The words of a command line, as far as they are read."""

    def __init__(self, known: list[Argument]) -> None:
        self.known = known
        self.by_flag = {flag: argument for argument in known for flag in argument.flags}
        self.by_flag = {f: a for f, a in self.by_flag.items() if not a.positional}
        switches = [argument for argument in known if argument.is_switch]
        self.negated = {f"--no-{argument.flags[-1][2:]}": argument for argument in switches}
        self.values: dict[str, Any] = {}
        self.errors: list[str] = []

    def read(self, words: list[str]) -> None:
        """Read all words."""
        at, plain = 0, []
        while at < len(words):
            word = words[at]
            at += 1
            if word == "--":
                plain += words[at:]
                break
            if not self._is_flag(word):
                plain.append(word)
                continue
            name, equals, value = self._split(word)
            end = at
            while end < len(words) and not self._is_flag(words[end]):
                end += 1
            following = [value] if equals else words[at:end]
            used = self._take_flag(name, following, bool(equals))
            at += 0 if equals else used
        self._take_plain(plain)

    def _is_flag(self, word: str) -> bool:
        """Whether a word is a flag and no value: not a negative number, not a sentence."""
        if not word.startswith("-") or word == "-":
            return False
        if word != "--" and self._split(word)[0] in self.by_flag:
            return True
        try:
            float(word)
        except ValueError:
            return " " not in word.partition("=")[0]
        return False

    def _split(self, word: str) -> tuple[str, str, str]:
        """Flag, "=" if a value is joined to it, and the value."""
        if not word.startswith("--") and word[:2] in self.by_flag and len(word) > 2:
            return word[:2], "=", word[2:].removeprefix("=")
        name, equals, value = word.partition("=")
        return name.replace("_", "-"), equals, value

    def _take_flag(self, name: str, words: list[str], joined: bool) -> int:
        """Take a flag and of the words after it those that are its value; return how many."""
        argument = self.by_flag.get(name) or self.negated.get(name)
        if argument is None:
            near = did_you_mean(name, [*self.by_flag, *self.negated])
            self.errors.append(f"unknown option {name}{near}")
            return len(words)
        if argument.is_switch:
            if joined:
                self.errors.append(f"{name} takes no value")
            self.values[argument.name] = name in self.by_flag
            return 0
        if not words and not argument.is_tuple:
            self.errors.append(f"{name} needs a value; write {name}=VALUE if it begins with '-'")
        count = len(words) if argument.is_tuple else min(1, len(words))
        self._store(argument, words[:count], argument.is_tuple or count > 0)
        return count

    def _take_plain(self, words: list[str]) -> None:
        """Give the words without a flag to the positional arguments, in order."""
        for argument in (argument for argument in self.known if argument.positional):
            count = len(words) if argument.is_tuple else 1
            self._store(argument, words[:count], bool(words))
            words = words[count:]
        self.errors += [f"unexpected argument '{word}'" for word in words]

    def _store(self, argument: Argument, words: list[str], is_given: bool) -> None:
        if not is_given:
            return
        try:
            self.values[argument.name] = argument.value(words)
        except ValueError as error:
            self.errors.append(f"{argument.shown}: {error}")


def _build(cls: type, values: dict[str, Any], given: Any, prefix: str) -> Any:
    """Make the dataclass from values by their dotted names, over those of `given`."""
    made = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        full, default = f"{prefix}{field.name}", MISSING
        if given is not None:
            default = getattr(given, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        elif field.default is not MISSING:
            default = field.default
        if is_dataclass(hints[field.name]):
            inner = typing.cast(type, hints[field.name])
            made[field.name] = _build(inner, values, default, f"{full}.")
        else:
            made[field.name] = values.get(full, default)
    return cls(**made)


def _missing(config: Any, known: list[Argument]) -> list[str]:
    """A line for each argument that is needed and not given."""
    names = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is MISSING]
    if not names:
        return []
    from xinslm.cli.help import field_docs

    docs = field_docs(type(config))
    shown = {argument.name: argument.shown for argument in known}
    return [f"{shown[name]} is missing: {docs.get(name, '')}".rstrip(": ") for name in names]
