"""`--help` of each command: every option in one group, an example that parses, true defaults."""

import dataclasses
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from xinslm.cli import help
from xinslm.cli.groups import GROUP_OF, GROUPS
from xinslm.cli.main import _parse, main
from xinslm.commands import COMMANDS


def plain_fields():
    """Fields of the commands' classes that are flags: neither positional nor nested."""
    for name, command in COMMANDS.items():
        for option in help.options(command.load("config")):
            if not option.positional and "." not in option.name:
                yield name, option.name


def test_every_option_is_in_exactly_one_group_and_every_name_is_of_an_option():
    listed = [name for names in GROUPS.values() for name in names.split()]
    assert len(listed) == len(set(listed)) == len(GROUP_OF)
    assert {name for _, name in plain_fields()} == set(listed)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_shown_once(name, capsys):
    command = COMMANDS[name]
    cls = command.load("config")
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    heads = [re.split("  +", line.strip())[0] for line in re.findall(r"^  \S.*", shown, re.M)]
    words = [word.replace("--[no-]", "--") for head in heads for word in re.split(",? ", head)]
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(typing.get_type_hints(cls)[field.name]):
            continue
        flag = "--" + field.name.replace("_", "-")
        assert words.count(flag) + words.count(field.name.upper()) == 1, field.name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_most_used_options_are_five_and_hold_what_is_required(name, capsys):
    command = COMMANDS[name]
    options = list(help.options(command.load("config")))
    most_used = command.most_used.split()
    assert len(set(most_used)) == len(most_used) == min(5, len(options))
    assert {option.name for option in options if option.required} <= set(most_used)
    main([*name.split(), "--help"])
    first = capsys.readouterr().out.partition("Most used:\n")[2].partition("\n\n")[0]
    assert all(option.flags in first for option in options if option.name in most_used)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_parses_and_is_a_possible_configuration(name, capsys):
    command = COMMANDS[name]
    config = _parse(name, command, shlex.split(command.example))
    assert config.errors() == []
    main([*name.split(), "-h"])
    assert f"example: xinslm {name} {command.example}\n" in capsys.readouterr().out


SAMPLES = {
    "PATH": (["some/where"], Path("some/where")),
    "TEXT": (["a b"], "a b"),
    "INT": (["-7"], -7),
    "FLOAT": (["-2.5e-3"], -0.0025),
    "{True,False}": (["True"], True),
    "PATH ...": (["a", "b"], (Path("a"), Path("b"))),
    "TEXT ...": (["a", "b"], ("a", "b")),
    "FLOAT ...": (["1", ".5"], (1.0, 0.5)),
}
"""For each kind of value that help shows: words, and what they are."""


@pytest.mark.parametrize("name", COMMANDS)
def test_each_flag_that_is_shown_is_taken_and_sets_its_field(name):
    command = COMMANDS[name]
    for option in help.options(command.load("config")):
        assert option.text, option.name
        if option.positional:
            continue
        for written in option.flags.split(", "):
            flag, _, kind = written.partition(" ")
            kind = kind or option.usage.partition(" ")[2]
            if not kind:
                plain = flag.replace("[no-]", "")
                cases = [([plain], True), ([plain.replace("--", "--no-", 1)], False)]
            elif kind in SAMPLES:
                words, value = SAMPLES[kind]
                cases = [([flag, *words], value)]
            else:
                cases = [([flag, word], word) for word in kind.strip("{}").split(",")]
            for words, value in cases:
                config = _parse(name, command, [*shlex.split(command.example), *words])
                for part in option.name.split("."):
                    config = getattr(config, part)
                assert config == value and type(config) is type(value), words


def test_defaults_are_those_of_the_configuration_that_holds_a_section(capsys):
    main(["distill", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--loss.alpha FLOAT Weight of" in shown
    assert "(default: 0.5)" in shown.partition("--loss.alpha")[2].partition("--loss.beta")[0]
    main(["onpolicy", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.0)" in shown.partition("--loss.alpha")[2].partition("--loss.beta")[0]
    assert "(default: 0.5)" in shown.partition("--mix-loss.alpha")[2].partition("--mix-loss.b")[0]


def test_a_docstring_of_a_derived_class_wins():
    @dataclasses.dataclass
    class Base:
        a: int = 1
        """Of the
        base."""
        b: int = 2
        """Kept."""

    @dataclasses.dataclass
    class Derived(Base):
        a: int = 3
        """Of the derived."""

    assert help.field_docs(Base) == {"a": "Of the base.", "b": "Kept."}
    assert help.field_docs(Derived) == {"a": "Of the derived.", "b": "Kept."}


@pytest.mark.parametrize("columns", ["60", "80", "250"])
def test_lines_fit_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    main(["distill", "--help"])
    lines = capsys.readouterr().out.splitlines()
    unbroken = [line for line in lines if len(line) > min(int(columns), help.WIDEST)]
    assert all(len(line.split()) <= 2 or line.startswith("example") for line in unbroken)


def test_help_of_a_command_loads_neither_torch_nor_a_parser():
    code = (
        "import sys; from xinslm.cli.main import main\n"
        f"for name in {[name.split() for name in COMMANDS]}: main([*name, '--help'])\n"
        "assert not {'torch', 'transformers', 'rich', 'argparse', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path("/"))
