"""The metrics of a report as tables, the same for HTML and Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xinslm.machine import is_shared
from xinslm.report.compare import (
    Row,
    difference,
    find_teacher,
    find_undistilled,
    gap_closed,
    smaller,
)
from xinslm.report.read import RunData

DASH = "–"
SHARED = (
    "Shared: other processes used more than a tenth of the machine's CPU time, so the speed is "
    "not reported."
)


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, the others are numbers unless named in
    `left`.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: Sequence[int] = (0,)
    """Left-aligned columns."""


def summary(run: RunData, others: Sequence[RunData]) -> list[Table]:
    """Return one table for each evaluation text, with the evaluation rows of all runs."""
    found = [(r, row) for r in [run, *others] for row in r.evaluation]
    texts = dict.fromkeys((row.get("data"), row.get("documents")) for _, row in found)
    return [
        _summary(run, [x for x in found if (x[1].get("data"), x[1].get("documents")) == text])
        for text in texts
    ]


def _summary(run: RunData, found: list[tuple[RunData, Row]]) -> Table:
    every = [row for _, row in found]
    teacher = find_teacher(run, every)
    undistilled = find_undistilled(every, teacher)
    gap = any(gap_closed(row, teacher, undistilled) for row in every)
    several = len({id(r) for r, _ in found}) > 1
    head = ["Model", "Bits per byte", "Bits vs. teacher", "Size vs. teacher", "Gap closed"]
    head += ["Perplexity", "Parameters", "File", "Tokens/s"]
    rows = []
    for r, row in found:
        against = [DASH, DASH]
        if teacher is not None and row is not teacher:
            against = [difference(row, teacher), smaller(row, teacher) or DASH]
        cells = [
            f"{row['name']} ({r.name})" if several and row is not teacher else str(row["name"]),
            f"{row['bits_per_byte']:.4f}",
            *against,
            gap_closed(row, teacher, undistilled) or DASH,
            f"{row['perplexity']:.3f}",
            _count(row.get("parameters")),
            size(row.get("file_bytes")),
            "shared" if shared(row) else _count(row.get("tokens_per_second")),
        ]
        rows.append(cells)
    if baseline := next((row.get("unigram_bits_per_byte") for row in every), None):
        rows.append(["token frequencies alone", f"{baseline:.4f}"] + [DASH] * (len(head) - 2))
    dropped = {2, 3, 4} if teacher is None else set() if gap else {4}
    if several_tokenizers := len({row.get("tokens") for row in every}) > 1:
        dropped |= {5}
    kept = [i for i in range(len(head)) if i not in dropped]
    per_token = "Perplexity is per token, so it compares within one tokenizer only"
    notes = [_data(every[0])]
    notes.append(f"{per_token}; these have several." if several_tokenizers else f"{per_token}.")
    if gap and undistilled is not None:
        notes.append(f"Gap closed: 100 % is the teacher, 0 % is {undistilled['name']}.")
    notes += _where("Measured", every)
    notes += [SHARED] * any(map(shared, every))
    table = [[cells[i] for i in kept] for cells in rows]
    return Table([head[i] for i in kept], table, " ".join(notes))


def _data(row: Row) -> str:
    amount = f"{_count(row.get('documents'))} documents, {_count(row.get('bytes'))} bytes"
    return f"{row.get('data', 'unnamed data')}: {amount}."


def _where(verb: str, rows: Sequence[Row]) -> list[str]:
    """Sentences with the date and the machine of rows."""
    days: dict[str, set[str]] = {}
    for row in rows:
        if row.get("machine"):
            days.setdefault(str(row["machine"]), set()).add(str(row.get("date"))[:10])
    return [
        f"{verb} on {' and '.join(sorted(found))}: {machine}." for machine, found in days.items()
    ]


def shared(row: Row) -> bool:
    """Whether other processes used too much of the machine to report a speed."""
    return is_shared(row.get("other_load"))


def timed(run: RunData) -> list[Row]:
    """Training lines with a speed, without those that shared the machine; none if most did."""
    lines = [row for row in run.training if row.get("tokens_per_second") is not None]
    alone = [row for row in lines if not shared(row)]
    return alone if 2 * len(alone) >= len(lines) else []


def training(runs: Sequence[RunData]) -> Table | None:
    """The training results of each run."""
    rows = [cells for run in runs if (cells := _trained(run))]
    head = ["Run", "Steps", "Target tokens", "Last CE", "Best validation", "Last validation"]
    notes = [
        "CE is the hard-label cross-entropy in nats per token, so it compares within one tokenizer "
        "only; tokens/s is the median over the steps."
    ]
    notes += [SHARED] * any("shared" in cells for cells in rows)
    notes += _where("Trained", [run.about for run in runs])
    return Table([*head, "Tokens/s", "Time"], rows, " ".join(notes)) if rows else None


def _trained(run: RunData) -> list[str] | None:
    """A run's row of the training table; None if it has no metrics."""
    measured = [row["validation_ce"] for row in run.validation if row["validation_ce"] is not None]
    if not run.training and not measured:
        return None
    last = run.training[-1] if run.training else {}
    end = last or run.validation[-1]
    speeds = sorted(row["tokens_per_second"] for row in timed(run))
    without = "shared" if any(map(shared, run.training)) else DASH
    return [
        run.name,
        _count(end["step"]),
        _count(end.get("tokens")),
        _fixed(last.get("ce", last.get("loss"))),
        _fixed(min(measured)) if measured else DASH,
        _fixed(measured[-1]) if measured else DASH,
        _count(speeds[len(speeds) // 2]) if speeds else without,
        _duration(last.get("seconds")),
    ]


def files(run: RunData) -> Table | None:
    """The files made from the run."""
    rows = []
    for row in run.files:
        bits = row.get("bits_per_weight")
        cells = [str(row["name"]), str(row.get("path", "")), size(row["bytes"])]
        rows.append([*cells, f"{bits:.2f}" if isinstance(bits, int | float) else DASH])
    return Table(["File", "Path", "Size", "Bits per weight"], rows, left=(0, 1)) if rows else None


def size(value: Any) -> str:
    """Format a number of bytes with three significant digits: 950 B, 12.3 kB, 4.56 MB."""
    if not isinstance(value, int | float):
        return DASH
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= one:
            return f"{value / one:.{max(0, 2 - len(str(int(value / one))) + 1)}f} {unit}"
    return f"{value:,.0f} B"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else DASH


def _fixed(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else DASH


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes >= 60
        else f"{minutes} min {rest:02} s"
    )
