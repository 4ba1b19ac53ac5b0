"""The command line's own duties: dispatch, help without torch, errors without tracebacks."""

import dataclasses
import resource
import subprocess
import sys

import pytest

from xinslm import commands
from xinslm.cli.live import PlainLines
from xinslm.cli.main import main
from xinslm.commands import COMMANDS, Command
from xinslm.progress import Progress


def test_help_is_quick_and_free_of_torch():
    code = (
        "import sys, time; from xinslm.cli.main import main; main(['--help']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "print(time.process_time())"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.3
    for name in COMMANDS:
        assert name in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_function(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    assert "usage: xinslm " + name in capsys.readouterr().out
    assert callable(COMMANDS[name].load("run"))


def test_help_of_a_command_imports_no_torch():
    code = (
        "import sys; from xinslm.cli.main import main\n"
        "for name in ('distill', 'quantize', 'generate', 'evaluate', 'prepare', 'report'):\n"
        "    main([name, '--help'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil"], "Did you mean 'distill'?"),
        (["tokenizer"], "'tokenizer' needs one of: show, train"),
        (["export", "pickle"], "'export' needs one of: all, coreml, gguf, hf, mlx"),
        (["distill", "--config"], "--config needs a file"),
        (["distill", "--config", "/nowhere.yaml"], "/nowhere.yaml: No such file or directory"),
        (["distill", "--data-path", "x", "-o", "y"], "give --cache"),
    ],
)
def test_usage_errors_have_exit_code_2_and_no_traceback(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_unknown_flag_is_refused_with_a_suggestion(capsys):
    assert main(["distill", "--data-path", "x", "-o", "y", "--los.temperature", "2"]) == 2
    captured = capsys.readouterr()
    assert "--loss.temperature" in captured.out + captured.err


@pytest.mark.parametrize(
    ("flag", "word", "message"),
    [
        ("batch-size", "8.5", "is '8.5', but must be an integer"),
        ("max-steps", "1e3", "is '1e3', but must be an integer"),
        ("learning-rate", "fast", "is 'fast', but must be a number"),
    ],
)
def test_a_number_is_refused_in_the_same_words_from_a_flag_and_from_yaml(
    flag, word, message, tmp_path, capsys
):
    base = ["pretrain", "--data-path", "x", "-o", "y"]
    assert main([*base, f"--{flag}", word]) == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"--{flag}: {message}" in printed and "literal" not in printed
    key = flag.replace("-", "_")
    (tmp_path / "a.yaml").write_text(f"{key}: {word}\n")
    assert main([*base, "--config", str(tmp_path / "a.yaml")]) == 2
    assert f"a.yaml:1: '{key}' {message}" in capsys.readouterr().err


# what each command needs to be read at all; none of it exists
NEEDED = {
    "tokenizer train": ["--data-path", "x"],
    "prepare": ["--data-path", "x", "--tokenizer-path", "x"],
    "pretrain": ["--data-path", "x"],
    "adapt": ["x", "--data-path", "x"],
    "cache merge": ["x", "x"],
    "cache": ["x", "--data-path", "x"],
    "synthesize": ["x", "--prompts", "x"],
    "prune": ["x", "--data-path", "x"],
    "distill": ["--data-path", "x", "--cache", "x"],
    "onpolicy": ["--student", "x", "--teacher", "x", "--prompts", "x"],
    "quantize": ["x"],
    "export packed": ["x"],
    "import": ["x"],
    "export gguf": ["x"],
    "export hf": ["x"],
    "export all": ["x"],
    "export mlx": ["x"],
    "export coreml": ["x"],
    "report": ["x"],
    "benchmark": ["x"],
    "demo": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_made_is_refused_before_any_work(
    name, tmp_path, monkeypatch, capsys
):
    command = COMMANDS[name]
    names = {field.name for field in dataclasses.fields(command.load("config"))}
    if name == "plan" or not names & {"output_dir", "output_path"}:
        assert name not in NEEDED
        return

    class Untouchable(Command):
        def load(self, what):
            assert what == "config", "work began"
            return Command.load(command, what)

    monkeypatch.setitem(commands.COMMANDS, name, Untouchable(*vars(command).values()))
    (tmp_path / "file").write_text("")
    assert main([*name.split(), *NEEDED[name], "-o", str(tmp_path / "file" / "x")]) == 2
    assert "file/x cannot be written: " in capsys.readouterr().err


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path, monkeypatch, capsys):
    seen = []
    command = COMMANDS["distill"]

    class Result:
        def describe(self):
            return "done"

    def fake(self, what):
        if what == "run":
            return lambda config, on_progress: seen.append(config) or Result()
        return Command.load(command, what)

    monkeypatch.setitem(
        commands.COMMANDS, "distill", type("C", (Command,), {"load": fake})(*vars(command).values())
    )
    (tmp_path / "a.yaml").write_text(
        "data_path: d\noutput_dir: o\ncache: c\nseed: 5\nloss:\n  alpha: 0.4\n"
    )
    assert (
        main(
            [
                "distill",
                "--config",
                str(tmp_path / "a.yaml"),
                "--seed",
                "6",
                "--max_seq_length",
                "128",
            ]
        )
        == 0
    )
    assert (seen[0].seed, seen[0].loss.alpha, seen[0].loss.beta, seen[0].max_seq_length) == (
        6,
        0.4,
        0.5,
        128,
    )
    assert capsys.readouterr().out == "done\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(28, "No space left on device", "/out/tokens.bin"),
            1,
            "No space left on device (/out/tokens.bin)",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ZeroDivisionError("oops"),
            1,
            "internal error: ZeroDivisionError: oops. Add --debug for the traceback",
        ),
    ],
)
def test_failures_are_one_line(error, code, message, monkeypatch, capsys):
    def fail(self, what):
        raise error

    monkeypatch.setattr(Command, "load", fail)
    assert main(["distill"]) == code
    assert message in capsys.readouterr().err
    with pytest.raises(type(error)):
        main(["distill", "--debug"])


def test_plain_lines_show_figures_and_end(capsys):
    listen = PlainLines()
    for done in range(1, 6):
        listen(Progress("distill", done, 5, "steps", {"loss": 2.34567, "tokens/s": 12345.6}))
    listen(Progress("distill", note="careful"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["distill  5/5 steps  loss 2.3457  tokens/s 12,346", "distill: careful"]


@pytest.mark.parametrize("word", ["--help", "-h", "--debug", "--config", "--config=x"])
def test_after_two_dashes_no_word_is_a_flag(word, capsys):
    assert main(["plan", "--", word]) == 2
    assert f"unexpected argument '{word}'" in capsys.readouterr().err
