"""Commands whose output is more than a few lines at the end: streamed text, a conversation, coloured tokens."""

import sys
from collections.abc import Callable
from typing import Any


def stream_text(run: Callable[..., Any], config: Any) -> None:
    """Print a continuation as it comes, then its figures on the error stream, so that the text can be piped."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    result = run(config, on_text=write)
    print()
    print(result.describe(), file=sys.stderr)


def converse(run: Callable[..., Any], config: Any) -> None:
    """Hold a conversation on the terminal."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    run(config, input, write)


def show_tokens(run: Callable[..., Any], config: Any) -> None:
    """Print tokens in colour and the merges that made them."""
    from rich.console import Console

    from xinslm.tokenizer.show import render

    result = run(config)
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(render(result))
    else:
        print(result.describe())


def play_demo(run: Callable[..., Any], config: Any) -> None:
    """Run the demo, each of its commands through the entry point that a user's would take."""
    from xinslm.cli.main import main

    def say(text: str) -> None:
        print(text, flush=True)

    print(run(config, main, say).describe())
