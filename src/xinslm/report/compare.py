"""Compare a student with its teacher, and with a student trained without a teacher.

Bits per byte is a logarithm, so a ratio of two values has no meaning. The report gives the
difference to the teacher, the ratio of file sizes, and the share of the gap between the undistilled
student and the teacher that distillation closed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xinslm.report.read import RunData

Row = dict[str, Any]


@dataclass(frozen=True)
class Headline:
    """The main metrics of one student."""

    name: str
    bits_per_byte: str
    meaning: tuple[str, ...]
    """Phrases: size and loss compared with the teacher, the share of the gap closed."""


def headlines(run: RunData, others: Sequence[RunData]) -> list[Headline]:
    """Return the first three students of a run's own evaluation, on the teacher's evaluation
    text.
    """
    teacher = find_teacher(run, run.evaluation)
    data = (teacher or next(iter(run.evaluation), {})).get("data")
    rows = [row for r in [run, *others] for row in r.evaluation if row.get("data") == data]
    undistilled = find_undistilled(rows, teacher)
    made = []
    for row in run.evaluation:
        if row is teacher or row is undistilled or row.get("data") != data:
            continue
        phrases = []
        if teacher is not None:
            phrases.append(", ".join(filter(None, (smaller(row, teacher), lost(row, teacher)))))
            if share := gap_closed(row, teacher, undistilled):
                assert undistilled is not None, "there is no share without it"
                worse = row["bits_per_byte"] > undistilled["bits_per_byte"]
                closed = f"{share} of the gap between {undistilled['name']} and teacher closed"
                phrases.append(f"worse than {undistilled['name']}" if worse else closed)
        made.append(Headline(str(row["name"]), f"{row['bits_per_byte']:.4f}", tuple(phrases)))
    return made[:3]


def find_teacher(run: RunData, rows: Sequence[Row]) -> Row | None:
    """Find the row named 'teacher...', or that of the run's teacher."""
    named = [row for row in rows if str(row["name"]).lower().startswith("teacher")]
    same = [row for row in rows if row.get("model") and row["model"] == run.config.get("teacher")]
    return next(iter(named + same), None)


def find_undistilled(rows: Sequence[Row], teacher: Row | None) -> Row | None:
    """Find the row named 'undistilled...', or that of a model made by `xinslm pretrain`."""
    others = [row for row in rows if row is not teacher]
    named = [row for row in others if str(row["name"]).lower().startswith("undistilled")]
    pretrained = [row for row in others if row.get("trained_by") == "pretrain"]
    return next(iter(named + pretrained), None)


def lost(row: Row, teacher: Row) -> str:
    """'+0.39 bits per byte': the difference to the teacher."""
    return f"{difference(row, teacher)} bits per byte"


def difference(row: Row, teacher: Row) -> str:
    """'+0.39'."""
    return f"{row['bits_per_byte'] - teacher['bits_per_byte']:+.2f}"


def smaller(row: Row, teacher: Row) -> str:
    """'5.2x smaller', by the bytes of the weights; '' if a size is unknown."""
    ours, theirs = row.get("file_bytes"), teacher.get("file_bytes")
    if not ours or not theirs:
        return ""
    ratio = max(theirs / ours, ours / theirs)
    if ratio < 1.05:
        return "same size"
    factor = f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"
    return f"{factor}x {'smaller' if ours < theirs else 'larger'}"


def gap_closed(row: Row, teacher: Row | None, undistilled: Row | None) -> str:
    """'62 %' of the gap between undistilled student and teacher; '' if there is no gap."""
    if teacher is None or undistilled is None or row is teacher or row is undistilled:
        return ""
    gap = undistilled["bits_per_byte"] - teacher["bits_per_byte"]
    if gap <= 0:
        return ""
    return f"{100 * (undistilled['bits_per_byte'] - row['bits_per_byte']) / gap:.0f} %"
