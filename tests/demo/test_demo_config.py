"""Settings of `demo`: what no demo can be made of is refused before anything is written."""

import math

import pytest

from xinslm.cli.main import main
from xinslm.demo.config import DemoConfig
from xinslm.errors import UsageError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("megabytes", 0.0),
        ("megabytes", -1.0),
        ("megabytes", math.nan),
        ("megabytes", math.inf),
        ("teacher_steps", 0),
        ("student_steps", -3),
        ("seed", -1),
    ],
)
def test_numbers_that_cannot_work_are_named(name, value, tmp_path, capsys):
    with pytest.raises(UsageError, match=f"{name} is {value}, but must be"):
        DemoConfig(**{name: value}).check()
    assert (
        main(["demo", "-o", str(tmp_path / "out"), f"--{name.replace('_', '-')}", str(value)]) == 2
    )
    assert name in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_least_demo_is_taken():
    DemoConfig(megabytes=0.01, teacher_steps=1, student_steps=1).check()
