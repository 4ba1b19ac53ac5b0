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


def flags_of_tyro(cls: type) -> set[str]:
    """The flags and positionals that the command line takes, from tyro's own parser."""
    import tyro

    parser = tyro.extras.get_parser(cls)
    actions = [action for action in parser._actions if "-h" not in action.option_strings]
    return {
        word if word.startswith("-") else action.dest
        for action in actions
        for word in (action.option_strings or [action.dest])
    }


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


@pytest.mark.parametrize("name", COMMANDS)
def test_each_flag_that_is_shown_is_taken(name):
    cls = COMMANDS[name].load("config")
    shown = set()
    for option in help.options(cls):
        flags = option.flags.replace("--[no-]", option.flags.replace("[no-]", "no-") + " --")
        words = flags.replace(",", "").split()
        shown |= {word for word in words if word.startswith("-")}
        assert option.text, option.name
    assert shown <= {flag.replace("_", "-") for flag in flags_of_tyro(cls)}


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
        "assert not {'torch', 'transformers', 'rich.markdown'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path("/"))
