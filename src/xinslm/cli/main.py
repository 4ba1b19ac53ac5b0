"""The command line: finds the command, reads YAML and flags into its configuration, runs it,
prints.

    xinslm distill --config recipe.yaml --learning-rate 1e-3

Flags win over YAML, YAML over defaults. Exit codes: 0 done, 1 failure, 2 wrong usage, 130 stopped
by Ctrl-C. A mistake of the user's is one message without a traceback; `--debug` shows it.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from xinslm import __version__
from xinslm.cli.terminal import say
from xinslm.cli.threads import FreeCores
from xinslm.commands import COMMANDS, Command
from xinslm.errors import Interrupted, UsageError, XinslmError
from xinslm.heap import keep_free_memory
from xinslm.progress import Listener

SEE_HELP = "See `xinslm --help`."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    _prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    words, plain = _at_dashes(words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] + plain
    try:
        return _dispatch(words)
    except BaseException as error:
        if debug:
            raise
        return _explain(error)


def _prepare_streams() -> None:
    """Let a standard stream that the caller closed be empty, and characters that the output's
    encoding lacks (cp1252 in a pipe on Windows) be written as escapes.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"xinslm {__version__}")
        return 0
    name, rest = _split(words)
    return _run(name, COMMANDS[name], rest)


def perform(words: Sequence[str], on_progress: Listener) -> Any:
    """Run one command without printing and return its result; raise what it raises.

    For commands that take a progress listener, which are those without a presentation of their own.
    """
    name, rest = _split(list(words))
    command = COMMANDS[name]
    config = _parse(name, command, rest)
    _require_output(config)
    listener = FreeCores(on_progress, os.environ)
    return command.load("run")(config, listener, **_secrets(config))


def _at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before `--`, among which are flags, and the others with it."""
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end:]


def _split(words: list[str]) -> tuple[str, list[str]]:
    """Name of a command, and its arguments."""
    for size in (2, 1):
        name = " ".join(words[:size])
        if name in COMMANDS:
            return name, words[size:]
    raise UsageError(_unknown(words))


def _run(name: str, command: Command, words: list[str]) -> int:
    if {"-h", "--help"} & set(_at_dashes(words)[0]):
        from xinslm.cli.help import render

        print(render(name, command))
        return 0
    config = _parse(name, command, words)
    if name.startswith("export "):
        keep_free_memory()
    if name != "plan":  # which has the settings of a run, but writes nothing
        _require_output(config)
    if command.present:
        from xinslm.cli import present

        getattr(present, command.present)(command.load("run"), config, perform)
        return 0
    from xinslm.cli import live

    with live.listener() as on_progress:
        listener = FreeCores(on_progress, os.environ)
        result = command.load("run")(config, listener, **_secrets(config))
    say(result.describe())
    return 0


def _require_output(config: Any) -> None:
    """Raise UsageError before any work if the output can be neither made nor written to."""
    for name in ("output_dir", "output_path"):
        if (path := getattr(config, name, None)) is not None:
            from xinslm.folders import refuse_uncreatable

            refuse_uncreatable(path)


def _secrets(config: Any) -> dict[str, str]:
    """The API key in the environment variable that a configuration names."""
    name = getattr(getattr(config, "endpoint", None), "api_key_env", None)
    if name is None:
        return {}
    if not os.environ.get(name, "").strip():
        raise UsageError(
            f"--endpoint.api-key-env {name}: there is no such environment variable, or it is empty"
        )
    from xinslm.teachers.client import read_key

    return {"api_key": read_key(os.environ[name], f"--endpoint.api-key-env {name}")}


def _parse(name: str, command: Command, words: list[str]) -> Any:
    """Read `--config FILE` (any number of them) and flags into the command's configuration."""
    from xinslm.cli.arguments import parse

    files, rest = _take_config_files(words)
    cls, given = command.load("config"), None
    if files:
        from xinslm.config import from_yaml  # YAML is slow to import

        given = from_yaml(cls, files, MISSING)
    try:
        return parse(cls, rest, given)
    except UsageError as error:
        raise UsageError(f"{error}\nSee `xinslm {name} --help`.") from None


def _take_config_files(words: list[str]) -> tuple[list[Path], list[str]]:
    words, plain = _at_dashes(words)
    files, rest, pending = [], [], iter(words)
    for word in pending:
        if word == "--config":
            path = next(pending, None)
            if path is None:
                raise UsageError("--config needs a file")
            files.append(Path(path))
        elif word.startswith("--config="):
            files.append(Path(word.removeprefix("--config=")))
        else:
            rest.append(word)
    return files, rest + plain


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    about = "large open language models in, small ones that run on a laptop out"
    commands = "\n".join(lines)
    return f"""xinslm {__version__}: {about}.

  xinslm COMMAND [--config FILE.yaml] [flags]      `xinslm COMMAND --help` lists a command's flags

{commands}

  --debug after a command shows the traceback of an error."""


def _unknown(words: list[str]) -> str:
    import difflib

    groups = sorted(name for name in COMMANDS if name.startswith(f"{words[0]} "))
    if groups:
        names = ", ".join(name.split()[1] for name in groups)
        return f"'{words[0]}' needs one of: {names}. {SEE_HELP}"
    near = difflib.get_close_matches(words[0], [name.split()[0] for name in COMMANDS], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown command '{words[0]}'.{hint} {SEE_HELP}"


def _explain(error: BaseException) -> int:
    """Print one message for an error; return the exit code."""
    if isinstance(error, BrokenPipeError):
        return 1
    text, code = _described(error)
    say(text, sys.stderr)
    return code


def _described(error: BaseException) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, UsageError):
        return f"error: {text}", 2
    if isinstance(error, XinslmError):
        return f"error: {text}", 130 if isinstance(error, Interrupted) else 1
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"error: {error.strerror or text}{where}", 1
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in text):
        return f"error: out of memory: {first}. Take smaller batches or a smaller model", 1
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"error: torch.compile failed ({first}). Leave --compile out", 1
    return f"internal error: {type(error).__name__}: {text}. Add --debug for the traceback", 1


if __name__ == "__main__":
    sys.exit(main())
