"""What the demo shows: one line a stage with the time left, and one screen of results."""

import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from xinslm.demo.stages import PLAIN, PRUNED, SMALL, STUDENT, TEACHER, Stage
from xinslm.display import printable
from xinslm.progress import Listener, Progress

WIDTH, SHOWN = 100, 3
_COLUMN = (WIDTH - 3) // 2
_SECONDS_BETWEEN_UPDATES = 0.5
_DOUBT = 60.0
"""Seconds of finished stages that are needed before their speed counts as much as the plan."""


class StageLine:
    """Prints a line for each stage, kept up to date where the output is a terminal.

    The time left is the sum of the stages' usual times, scaled by how long the finished ones took.
    """

    def __init__(
        self, stages: Sequence[Stage], write: Callable[[str], None], live: bool = False
    ) -> None:
        self.stages, self.write, self.live = list(stages), write, live
        self.usual = self.taken = 0.0
        self.updated = 0.0

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Listener]:
        """Show the stage while it runs; the listener takes its progress."""
        began = time.monotonic()
        number = self.stages.index(stage)
        head = f"{number + 1:>2}/{len(self.stages)}  {stage.title}"

        def rest() -> float:
            return sum(later.seconds for later in self.stages[number + 1 :]) * self._ratio()

        def left() -> float:
            return rest() + max(0.0, stage.seconds * self._ratio() - (time.monotonic() - began))

        def listen(progress: Progress) -> None:
            now = time.monotonic()
            if not self.live or now - self.updated < _SECONDS_BETWEEN_UPDATES:
                return
            self.updated = now
            total = "" if progress.total is None else f"/{progress.total:,.0f}"
            place = f"{progress.done:,.0f}{total} {progress.unit}" if progress.done else ""
            self._show(f"{head:<60}{place:>22}  {_minutes(left())} left", "\r")

        if self.live:
            self._show(f"{head:<60}{'':>22}  {_minutes(left())} left", "\r")
        yield listen
        seconds = time.monotonic() - began
        self.usual, self.taken = self.usual + stage.seconds, self.taken + seconds
        self._show(f"{head:<74}{seconds:>6.0f} s  {_minutes(rest())} left", "\n")

    def _ratio(self) -> float:
        return (self.taken + _DOUBT) / (self.usual + _DOUBT)

    def _show(self, line: str, end: str) -> None:
        start = "\r" if self.live else ""
        self.write(f"{start}{line[:WIDTH]:<{WIDTH if self.live else 0}}{end}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class Demo(Protocol):
    """What the screen shows."""

    @property
    def folder(self) -> Path:
        """Where the demo wrote everything."""

    @property
    def rows(self) -> Sequence[dict[str, Any]]:
        """Rows of the student's evaluation.json."""

    @property
    def samples(self) -> Sequence[dict[str, Any]]:
        """Rows of its samples.json."""

    @property
    def benchmark(self) -> Sequence[dict[str, Any]]:
        """Rows of its benchmark.json."""

    @property
    def seconds(self) -> float:
        """How long the demo took."""


def results(demo: Demo, chat: bool) -> str:
    """One screen: models and their bits per byte, answers side by side, and where to go on."""
    folder, seconds = demo.folder, demo.seconds
    student = folder / "student"
    lines = ["", *_table(demo.rows), "", *_answers(demo.samples), *_followed(demo.benchmark)]
    lines += [
        f"report  {student / 'report.html'}: all answers, curves, what was gained and lost",
        f"time    {seconds / 60:.1f} minutes; every command is in {folder / 'commands.sh'}",
        "",
        "Next:",
        f"  xinslm chat {folder / 'student-4bit'}"
        if chat
        else f"  xinslm generate {folder / 'student-4bit'} --prompt 'One sunny day'",
        f"  xinslm doctor --data-path {folder / 'answers/data'} --cache {folder / 'answers/cache'}",
        f"  xinslm distill --data-path {folder / 'answers/data'} "
        f"--cache {folder / 'answers/cache'} \\\n      --init-from {folder / 'pruned'} "
        f"-o {folder / 'longer'} --num-epochs 3 --learning-rate 1e-4",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Models by texts."""
    texts = list(dict.fromkeys(row["data"] for row in rows))
    found = {(row["name"], row["data"]): row for row in rows}
    kinds = {
        "text.jsonl": "held-out answers",
        "paragraphs.jsonl": "other text",
        "data": "held-out stories",
    }
    cells = [
        ["bits per byte", "parameters", "on disk", *(kinds.get(Path(t).name, t) for t in texts)]
    ]
    for name in (TEACHER, PRUNED, PLAIN, STUDENT, SMALL):
        row = next((row for row in rows if row["name"] == name), None)
        if row is not None:
            size = f"{row['file_bytes'] / 1e6:,.1f} MB"
            values = [f"{found[name, text]['bits_per_byte']:.3f}" for text in texts]
            cells.append([name, f"{row['parameters'] / 1e6:,.1f} M", size, *values])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _followed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many of the instructions both models followed, and what so few of them can show."""
    task = next((task for row in rows for task in row["tasks"] if task["metric"] == "score"), None)
    if task is None:
        return []
    other, needed = task["other"], task["other"]["detectable"]
    doubt = f"; so few show differences above {needed:.2f} only" if needed else ""
    return [
        f"instructions  score of {task['items']} simple ones: {SMALL} {task['value']:.2f}, "
        f"{TEACHER} {other['value']:.2f}{doubt}"
    ]


def _answers(samples: Sequence[dict[str, Any]]) -> list[str]:
    """The first prompts with the answers of teacher and small student in two columns."""
    lines = []
    for prompt in list(dict.fromkeys(row["prompt"] for row in samples))[:SHOWN]:
        said = {row["name"]: row["text"] for row in samples if row["prompt"] == prompt}
        left, right = (_column(name, said.get(name, "")) for name in (TEACHER, SMALL))
        height = max(len(left), len(right))
        left, right = (part + [""] * (height - len(part)) for part in (left, right))
        lines.append(f"> {printable(prompt)}")
        lines += [f"{a:<{_COLUMN}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]
        lines.append("")
    return lines


def _column(name: str, text: str) -> list[str]:
    """A name and at most nine lines of text."""
    lines = [
        line
        for paragraph in printable(text).split("\n")
        for line in textwrap.wrap(paragraph, _COLUMN)
    ]
    return [name.upper(), *lines[:8], *(["..."] if len(lines) > 8 else [])]
