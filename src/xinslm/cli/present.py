"""Commands whose output is more than a few lines at the end: streamed text, a conversation,
coloured tokens.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from xinslm.cli.terminal import say, write
from xinslm.errors import XinslmError
from xinslm.progress import Listener

Entry = Callable[[Sequence[str], Listener], Any]
"""Runs another command line quietly and returns its result."""


def stream_text(run: Callable[..., Any], config: Any, command: Entry) -> None:
    """Print a continuation as it comes, and its figures on the error stream."""
    began = False

    def on_text(text: str) -> None:
        nonlocal began
        began = True
        write(text)

    try:
        result = run(config, on_text=on_text)
    except (XinslmError, KeyboardInterrupt):
        if began:  # so that the message has a line of its own
            print(flush=True)
        raise
    print()
    say(result.describe(), sys.stderr)


def converse(run: Callable[..., Any], config: Any, command: Entry) -> None:
    """Hold a conversation on the terminal."""
    run(config, input, write)


def show_tokens(run: Callable[..., Any], config: Any, command: Entry) -> None:
    """Print tokens in colour and the merges that made them."""
    from rich.console import Console

    from xinslm.tokenizer.show import render

    result = run(config)
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(render(result))
    else:
        say(result.describe())


def diagnose(run: Callable[..., Any], config: Any, command: Entry) -> None:
    """Print the checks, a line each; raise XinslmError where one failed, for the exit code."""
    from xinslm.cli import live

    with live.listener() as on_progress:
        result = run(config, on_progress)
    say(result.describe())
    if result.failed:
        raise XinslmError(
            f"{len(result.failed)} of {len(result.checks)} checks failed: "
            f"{', '.join(result.failed)}"
        )


def play_demo(run: Callable[..., Any], config: Any, command: Entry) -> None:
    """Run the demo, each of its commands as the command line would, but quietly."""
    say(run(config, command, write, live=sys.stdout.isatty()).describe())
