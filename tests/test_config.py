"""Strict YAML: what is read, and the words of every refusal."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from xinslm.cache.config import CacheConfig
from xinslm.config import from_yaml, to_dict, to_yaml
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError
from xinslm.losses.config import LossConfig


@dataclass(frozen=True)
class Inner:
    temperature: float = 1.0
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    path: Path
    rate: float = 0.1
    steps: int | None = None
    on: bool = False
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


MISSING = object()


def read(tmp_path, text, cls=Outer):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return from_yaml(cls, [file], MISSING)


def refusal(tmp_path, text):
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_values_take_the_type_of_their_field(tmp_path):
    text = "path: 010\nrate: 1e-4\nsteps: 7\non: true\nnames: [no, 010]\ninner:\n  temperature: 2\n"
    config = read(tmp_path, text)
    assert config == Outer(Path("010"), 1e-4, 7, True, ("no", "010"), Inner(2.0))
    assert isinstance(config.inner.temperature, float)


def test_null_is_none_and_a_missing_required_field_is_left_to_the_flags(tmp_path):
    config = read(tmp_path, "steps: null\n")
    assert config.steps is None and config.path is MISSING
    assert read(tmp_path, "").rate == 0.1


def test_dashes_are_underscores_and_later_files_win(tmp_path):
    (tmp_path / "a.yaml").write_text("rate: 1\npath: x\ninner: {temperature: 3}\n")
    (tmp_path / "b.yaml").write_text("rate: 2\ninner: {mode: b}\n")
    config = from_yaml(Outer, [tmp_path / "a.yaml", tmp_path / "b.yaml"], MISSING)
    assert (config.rate, config.inner) == (2.0, Inner(3.0, "b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rate: 1\ninner:\n  temprature: 2\n",
            "c.yaml:3: unknown key 'inner.temprature'. Did you mean 'inner.temperature'?",
        ),
        (
            "temperature: 2\n",
            "c.yaml:1: unknown key 'temperature'. Did you mean 'inner.temperature'?",
        ),
        (
            "zzz: 1\n",
            "c.yaml:1: unknown key 'zzz'. Known keys: path, rate, steps, on, names, inner",
        ),
        ("\nrate: fast\n", "c.yaml:2: 'rate' is 'fast', but must be a number"),
        ("steps: 1.5\n", "c.yaml:1: 'steps' is '1.5', but must be an integer"),
        ("on: yes\n", "c.yaml:1: 'on' is 'yes', but must be true or false"),
        ("inner:\n  mode: c\n", "c.yaml:2: 'inner.mode' is 'c', but must be one of a, b"),
        ("names: x\n", "c.yaml:1: 'names' must be a list"),
        ("rate: [1]\n", "c.yaml:1: 'rate' must be a single value"),
        ("rate:\n", "c.yaml:1: 'rate' has no value"),
        ("inner: 3\n", "c.yaml:1: inner must be keys and values"),
        ("- 1\n", "c.yaml:1: the file must be keys and values"),
        ("rate: 1\nrate: 2\n", "c.yaml:2: key 'rate' stands twice"),
    ],
)
def test_each_mistake_is_named_with_its_line(tmp_path, text, message):
    assert refusal(tmp_path, text) == message


def test_broken_yaml_and_unreadable_files(tmp_path):
    assert refusal(tmp_path, "rate: [1\n").startswith("c.yaml:2: not valid YAML")
    with pytest.raises(UsageError, match="No such file"):
        from_yaml(Outer, [tmp_path / "none.yaml"], MISSING)
    (tmp_path / "latin.yaml").write_bytes(b"path: \xe9\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        from_yaml(Outer, [tmp_path / "latin.yaml"], MISSING)


def test_all_mistakes_come_at_once(tmp_path):
    assert refusal(tmp_path, "rate: x\nstepz: 1\n").count("\n") == 1


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(
            data_path=Path("d"),
            output_dir=Path("o"),
            cache=Path("c"),
            loss=LossConfig(0.5, 0.5, 2.0),
        ),
        CacheConfig("org/name", Path("d"), Path("o"), revision="main"),
    ],
)
def test_what_is_written_reads_back_equal(tmp_path, config):
    text = to_yaml(config, "distill")
    assert read(tmp_path, text, type(config)) == config
    assert yaml.safe_load(text) == to_dict(config)
