"""Printing: all that reaches the terminal goes through here."""

import sys
from typing import TextIO

from xinslm.display import hide_passwords, printable


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message on stdout or `stream`, its control characters as escapes."""
    print(message(text), file=stream, flush=True)


def message(text: str) -> str:
    """A message as it may be shown: no control characters, no passwords of URLs."""
    return printable(hide_passwords(text))


def write(text: str) -> None:
    """Print generated text as it comes: exactly, or with escapes if stdout is a terminal."""
    if sys.stdout.isatty():
        text = printable(text.replace("\r\n", "\n"))
    print(text, end="", flush=True)
