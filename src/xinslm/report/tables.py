"""The figures of a report as tables, the same for HTML and Markdown.

Retained is the teacher's bits per byte as a share of the row's, both on the same text: 100 % loses
nothing, and the figure compares across tokenizers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xinslm.report.read import RunData


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, the others are numbers unless named in
    `left`.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: Sequence[int] = (0,)
    """Columns of text."""


def summary(run: RunData, others: Sequence[RunData]) -> list[Table]:
    """One table for each text that models were measured on: the runs' evaluation rows beside each
    other.
    """
    found = [(r, row) for r in [run, *others] for row in r.evaluation]
    texts = dict.fromkeys((row.get("data"), row.get("documents")) for _, row in found)
    return [
        _summary(run, [x for x in found if (x[1].get("data"), x[1].get("documents")) == text])
        for text in texts
    ]


def find_teacher(run: RunData, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Find the row to measure against: called 'teacher...', or of the model that the run learnt
    from.
    """
    named = [row for row in rows if str(row["name"]).lower().startswith("teacher")]
    same = [row for row in rows if row.get("model") and row["model"] == run.config.get("teacher")]
    return next(iter(named + same), None)


def retained(row: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Write the share of the teacher that a row keeps."""
    return f"{100 * teacher['bits_per_byte'] / row['bits_per_byte']:.1f} %"


def _summary(run: RunData, found: list[tuple[RunData, dict[str, Any]]]) -> Table:
    teacher = find_teacher(run, [row for _, row in found])
    several = len({id(r) for r, _ in found}) > 1
    rows = []
    for r, row in found:
        share = retained(row, teacher) if teacher else "–"
        name = f"{row['name']} ({r.name})" if several and row is not teacher else str(row["name"])
        cells = [name, f"{row['bits_per_byte']:.4f}", share, f"{row['perplexity']:.3f}"]
        rows.append(
            [
                *cells,
                _count(row.get("parameters")),
                size(row.get("file_bytes")),
                _count(row.get("tokens_per_second")),
            ]
        )
    head = ["Model", "Bits per byte", "Retained", "Perplexity", "Parameters", "File", "Tokens/s"]
    first = found[0][1]
    amount = f"{_count(first.get('documents'))} documents, {_count(first.get('bytes'))} bytes"
    where = f"{first.get('data', 'unnamed data')}: {amount}."
    meaning = " Retained: the teacher's bits per byte as a share of the row's." if teacher else ""
    if teacher is None:
        rows, head = [[*row[:2], *row[3:]] for row in rows], [head[0], head[1], *head[3:]]
    note = where + meaning + " Perplexity is per token, so it compares within one tokenizer only."
    return Table(head, rows, note)


def training(runs: Sequence[RunData]) -> Table | None:
    """What each run's training came to."""
    rows = []
    for run in runs:
        last = run.training[-1] if run.training else {}
        speeds = sorted(
            row["tokens_per_second"]
            for row in run.training
            if row.get("tokens_per_second") is not None
        )
        measured = [
            row["validation_ce"] for row in run.validation if row["validation_ce"] is not None
        ]
        if last or measured:
            end = last or run.validation[-1]
            cells = [
                run.name,
                _count(end["step"]),
                _count(end.get("tokens")),
                _fixed(last.get("ce", last.get("loss"))),
            ]
            cells += [
                _fixed(min(measured)) if measured else "–",
                _fixed(measured[-1]) if measured else "–",
            ]
            rows.append(
                [
                    *cells,
                    _count(speeds[len(speeds) // 2]) if speeds else "–",
                    _duration(last.get("seconds")),
                ]
            )
    head = [
        "Run",
        "Steps",
        "Target tokens",
        "Last CE",
        "Best validation",
        "Last validation",
        "Tokens/s",
        "Time",
    ]
    note = (
        "CE is the cross-entropy against the text in nats per token; tokens/s is the median over "
        "the steps."
    )
    return Table(head, rows, note) if rows else None


def files(run: RunData) -> Table | None:
    """The files that were made from the run."""
    rows = []
    for row in run.files:
        bits = row.get("bits_per_weight")
        cells = [str(row["name"]), str(row.get("path", "")), size(row["bytes"])]
        rows.append([*cells, f"{bits:.2f}" if isinstance(bits, int | float) else "–"])
    return Table(["File", "Path", "Size", "Bits per weight"], rows, left=(0, 1)) if rows else None


def size(value: Any) -> str:
    """Write a number of bytes with three digits that count: 950 B, 12.3 kB, 4.56 MB."""
    if not isinstance(value, int | float):
        return "–"
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= one:
            return f"{value / one:.{max(0, 2 - len(str(int(value / one))) + 1)}f} {unit}"
    return f"{value:,.0f} B"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else "–"


def _fixed(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes >= 60
        else f"{minutes} min {rest:02} s"
    )
