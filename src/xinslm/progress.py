"""Progress of a stage without printing: the stage calls a listener with `Progress` values.

The command line passes a listener that draws a live bar or plain lines; tests pass a list's
`append`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One report of a running stage."""

    stage: str
    """What is being done, in a word or two: 'distil', 'encode documents'."""
    done: float = 0
    """How much of `total` is done."""
    total: float | None = None
    """Total amount of work; None if unknown."""
    unit: str = ""
    """What `done` counts: 'steps', 'tokens', 'layers'."""
    values: Mapping[str, float | str] = field(default_factory=dict)
    """Figures of the moment: loss, tokens/s, learning rate."""
    note: str = ""
    """A sentence worth keeping on the screen: a warning, a milestone."""


Listener = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Listen to nothing."""
