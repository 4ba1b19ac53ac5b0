"""Progress on the terminal: a live bar with figures and time left; plain lines where the output is
not a terminal.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from xinslm.cli.terminal import message, say
from xinslm.progress import Listener, Progress

SECONDS_BETWEEN_LINES = 5.0


def figures(values: Mapping[str, float | str]) -> str:
    """'loss 2.31  tokens/s 8,120'."""
    return "  ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return message(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if size >= 0.01 or value == 0 else f"{value:.2e}"


class PlainLines:
    """One line every few seconds and a stage, with the time left; notes and validations at once."""

    def __init__(self) -> None:
        self.stage, self.began, self.printed, self.first_done = "", 0.0, 0.0, 0.0

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        now = time.monotonic()
        if progress.stage != self.stage:
            self.stage, self.first_done = progress.stage, progress.done
            self.began = self.printed = now
        if progress.note:
            say(f"{progress.stage}: {progress.note}")
            return
        finished = progress.total is not None and progress.done >= progress.total
        is_due = now - self.printed >= SECONDS_BETWEEN_LINES
        if not (finished or is_due or "validation" in progress.values):
            return
        self.printed = now
        say(f"{progress.stage}  {self._place(progress, now)}  {figures(progress.values)}".rstrip())

    def _place(self, progress: Progress, now: float) -> str:
        if progress.total is None:
            return f"{progress.done:,.0f} {progress.unit}"
        text = f"{progress.done:,.0f}/{progress.total:,.0f} {progress.unit}"
        gone = progress.done - self.first_done
        if gone > 0 and progress.done < progress.total:
            text += f"  {(now - self.began) * (progress.total - progress.done) / gone:,.0f} s left"
        return text


@contextmanager
def listener() -> Iterator[Listener]:
    """Give a listener for the length of a command."""
    if not sys.stdout.isatty():
        yield PlainLines()
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Bars(*columns) as bars:
        tasks: dict[str, tuple[TaskID, dict[str, float | str]]] = {}

        def listen(progress: Progress) -> None:
            if progress.note:
                note = f"[yellow]{progress.stage}:[/] {escape(message(progress.note))}"
                bars.console.print(note, highlight=False)
            if progress.stage not in tasks:
                task = bars.add_task(progress.stage, total=None, unit="", figures="")
                tasks[progress.stage] = task, {}
            task, values = tasks[progress.stage]
            values.update(progress.values)
            bars.update(
                task,
                completed=int(progress.done),
                total=None if progress.total is None else int(progress.total),
                unit=progress.unit,
                figures=figures(values),
            )

        yield listen
