"""What may reach a terminal: no control characters, no passwords, and a message for every error."""

import io
import os
import subprocess
import sys

import pytest

from xinslm.cli import terminal
from xinslm.cli.live import PlainLines, listener
from xinslm.cli.main import _explain, main
from xinslm.cli.present import stream_text
from xinslm.config import to_dict, to_yaml
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError, XinslmError
from xinslm.progress import Progress

EVIL = "a\x1b[31m\x07\x9b2J\r\x7f\udc80b"


def controls(text):
    return [char for char in text if not char.isprintable() and char not in "\n\t"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class CompileError(Exception):
    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("\n out of memory"),
        OSError(),
        OSError(" "),
        XinslmError(""),
        UsageError("\n"),
        KeyError(),
        CompileError(),
        CompileError("\n\nline 2"),
    ],
    ids=repr,
)
def test_every_error_has_a_message(error, capsys):
    assert _explain(error) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    said = lines[0].partition("error: ")[2]
    assert len(said) > 3 and "()" not in said


def test_error_messages_escape_control_characters_and_hide_passwords(capsys):
    code = main(["evaluate", f"/nowhere/{EVIL}", "--data-path", "http://me:hunter2@host/x"])
    assert code == 2
    assert _explain(OSError(2, "No such file", "http://me:hunter2@host/" + EVIL)) == 1
    err = capsys.readouterr().err
    assert not controls(err) and r"a\x1b[31m\x07\x9b2J\r\x7f\udc80b" in err
    assert "hunter2" not in err and "http://***@host/" in err


def test_progress_escapes_control_characters(capsys, monkeypatch):
    progress = Progress("stage", 1, 1, "files", {"file": EVIL}, "")
    note = Progress("stage", note=f"[red]{EVIL}[/x]")
    listen = PlainLines()
    listen(progress)
    listen(note)
    assert not controls(capsys.readouterr().out)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with listener() as live:
        live(progress)
        live(note)
    assert r"[red]a\x1b[31m" in screen.getvalue() and "\x9b" not in screen.getvalue()
    assert "\x1b[31m" not in screen.getvalue() and "\x07" not in screen.getvalue()


def test_generated_text_is_exact_in_a_pipe_and_harmless_on_a_terminal(monkeypatch):
    text = "two\r\nlines\tand \x1b]0;title\x07 日本 \n"
    for stream, expected in (
        (io.StringIO(newline=""), text),
        (Terminal(newline=""), "two\nlines\tand \\x1b]0;title\\x07 日本 \n"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.write(text)
        assert stream.getvalue() == expected


def test_characters_that_the_output_cannot_write_become_escapes():
    code = "from xinslm.cli.main import main; from xinslm.cli.terminal import write\n"
    code += "main(['--version']); write('caf\\u00e9 \\U0001f44d\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == b"caf\xe9 \\U0001f44d"


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_empty_and_its_text_goes_nowhere_else(closed, monkeypatch, capsys):
    monkeypatch.setattr(sys, closed, None)
    assert main(["distil"]) == 2
    terminal.write("text")
    if closed == "stdin":
        with pytest.raises(EOFError):
            input()
    shown = capsys.readouterr()
    assert shown.out == ("" if closed == "stdout" else "text")
    assert ("Did you mean" in shown.err) == (closed != "stderr")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), XinslmError("the model's logits are NaN")])
def test_an_error_in_the_middle_of_a_text_has_a_line_of_its_own(error, capsys):
    def run(config, on_text):
        on_text("once upon")
        raise error

    with pytest.raises(type(error)):
        stream_text(run, None, None)
    assert capsys.readouterr().out == "once upon\n"


def test_stored_settings_hold_no_password(tmp_path):
    config = DistillConfig(
        data_path=tmp_path, output_dir=tmp_path, teacher="https://me:hunter2@host:8000/v1"
    )
    assert "hunter2" not in to_yaml(config, "distill")
    assert to_dict(config)["teacher"] == "https://***@host:8000/v1"
