"""Configurations from words: how values are written, and what is said about wrong ones."""

import dataclasses
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from xinslm.cli.arguments import parse
from xinslm.commands import COMMANDS
from xinslm.config import from_yaml
from xinslm.errors import UsageError
from xinslm.hints import POSITIONAL, Alias


@dataclass(frozen=True)
class Inner:
    alpha: float = 0.5
    deep: bool = True


@dataclass(frozen=True)
class Config:
    source: Annotated[Path, POSITIONAL]
    """Where it is."""
    more: Annotated[tuple[str, ...], POSITIONAL]
    output_dir: Annotated[Path, Alias("-o")]
    count: int = 1
    rate: float | None = None
    kind: Literal["one", "two"] | None = None
    names: tuple[str, ...] | None = ("a",)
    tied: bool | None = None
    force: bool = False
    text: str = ""
    inner: Inner = field(default_factory=lambda: Inner(alpha=0.25))


NEEDED = ["s", "m", "-o", "out"]


def parsed(*words: str) -> Config:
    return parse(Config, [*NEEDED, *words])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--count", "-3"], "count", -3),
        (["--count=4"], "count", 4),
        (["--count", "4", "--count", "5"], "count", 5),
        (["--rate", "1e-3"], "rate", 0.001),
        (["--rate", "-inf"], "rate", float("-inf")),
        (["--rate", "None"], "rate", None),
        (["--kind", "two"], "kind", "two"),
        (["--names", "x", "y z", "-"], "names", ("x", "y z", "-")),
        (["--names"], "names", ()),
        (["--names", "None"], "names", None),
        (["--tied", "True"], "tied", True),
        (["--force"], "force", True),
        (["--force", "--no-force"], "force", False),
        (["--text", "- a list"], "text", "- a list"),
        (["--text", "None"], "text", "None"),
        (["--text=--force"], "text", "--force"),
        (["--text", "a=b"], "text", "a=b"),
        (["--output_dir", "x"], "output_dir", Path("x")),
        (["-ox"], "output_dir", Path("x")),
        (["--", "--force"], "more", ("m", "--force")),
    ],
)
def test_how_values_are_written(words, name, value):
    assert getattr(parsed(*words), name) == value


def test_words_without_a_flag_are_taken_in_order_also_between_flags():
    config = parse(Config, ["s", "--count", "2", "m", "--force", "n", "-o", "out"])
    assert (config.source, config.more) == (Path("s"), ("m", "n"))


def test_a_configuration_inside_keeps_the_defaults_it_has_there():
    assert parsed().inner == Inner(0.25, True)
    assert parsed("--no-inner.deep").inner == Inner(0.25, False)
    assert parsed("--inner.alpha", "1").inner == Inner(1.0, True)


def test_so_does_one_that_a_yaml_file_does_not_mention(tmp_path):
    (tmp_path / "a.yaml").write_text("count: 7\n")
    (tmp_path / "b.yaml").write_text("inner:\n  deep: false\n")
    for name, inner in (("a", Inner(0.25, True)), ("b", Inner(0.25, False))):
        assert from_yaml(Config, [tmp_path / f"{name}.yaml"], MISSING).inner == inner


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_yaml_file_changes_no_default(name, tmp_path):
    (tmp_path / "a.yaml").write_text("{}\n")
    cls = COMMANDS[name].load("config")
    given = from_yaml(cls, [tmp_path / "a.yaml"], MISSING)
    for entry in dataclasses.fields(cls):
        made = entry.default_factory is not dataclasses.MISSING
        default = entry.default_factory() if made else entry.default
        assert getattr(given, entry.name) == default


def test_flags_win_over_yaml_which_may_give_what_is_needed(tmp_path):
    (tmp_path / "a.yaml").write_text("output_dir: o\ncount: 7\ninner:\n  alpha: 0.1\nsource: y\n")
    given = from_yaml(Config, [tmp_path / "a.yaml"], MISSING)
    config = parse(Config, ["s", "m", "--count", "8"], given)
    assert (config.output_dir, config.count, config.inner.alpha) == (Path("o"), 8, 0.1)
    assert config.source == Path("s")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "1.5"], "--count: is '1.5', but must be an integer"),
        (["--rate", "fast"], "--rate: is 'fast', but must be a number"),
        (["--kind", "tow"], "is 'tow', but must be one of one, two. Did you mean 'two'?"),
        (["--tied", "yes"], "--tied: is 'yes', but must be true or false"),
        (["--cuont", "3"], "unknown option --cuont. Did you mean '--count'?"),
        (["--txet=two words"], "unknown option --txet. Did you mean '--text'?"),
        (["-o", ""], "is empty, but must be a path"),
        (["--inner.alfa=3"], "unknown option --inner.alfa. Did you mean '--inner.alpha'?"),
        (["-x"], "unknown option -x"),
        (["--count"], "--count needs a value"),
        (["--text", "--force"], "--text needs a value; write --text=VALUE if it begins with '-'"),
        (["--force=yes"], "--force takes no value"),
        (["--no-count", "1"], "unknown option --no-count"),
        (["--source", "x"], "unknown option --source"),
    ],
)
def test_what_is_said_about_wrong_words(words, message):
    with pytest.raises(UsageError) as caught:
        parsed(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_wrong_words_and_all_that_is_missing_are_said_at_once():
    with pytest.raises(UsageError) as caught:
        parse(Config, [])
    first, second, third = str(caught.value).splitlines()
    assert first == "SOURCE is missing: Where it is." and second == "MORE is missing"
    assert third == "--output-dir is missing"
    with pytest.raises(UsageError) as caught:
        parsed("--count", "x", "--kind", "y")
    assert str(caught.value).count("\n") == 1


def test_more_words_than_arguments():
    @dataclass(frozen=True)
    class One:
        model: Annotated[Path, POSITIONAL]

    with pytest.raises(UsageError, match="unexpected argument 'b'"):
        parse(One, ["a", "b"])
