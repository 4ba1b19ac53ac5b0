"""The results of a benchmark as tables for the terminal."""

from collections.abc import Sequence
from typing import Any

DASH = "-"


def describe(row: dict[str, Any]) -> str:
    """A table of tasks, one of speeds, and the notes."""
    parts = []
    if row["tasks"]:
        parts.append(_tasks(row))
    if row["speed"]:
        parts.append(_speed(row["speed"]))
    parts += [f"note: {note}" for note in row["notes"]]
    return "\n".join(parts)


def _tasks(row: dict[str, Any]) -> str:
    other = row["against"]
    head = ["task", "metric", row["model"]["name"], "+-", "items", "bits/byte"]
    if other is not None:
        head += [other["name"], "difference", "detectable", "flips", "retained"]
    lines = [head]
    for task in row["tasks"]:
        cells = [task["task"], task["metric"], *_value(task), _items(task), _bits(task)]
        lines.append(cells + (_compared(task) if other is not None else []))
    return _aligned(lines)


def _value(task: dict[str, Any]) -> list[str]:
    """The value, and half of the interval that matters: of all items, or of others like them."""
    estimate = task.get("full_set")
    value = task["value"] if estimate is None else estimate["value"]
    ends = (estimate or task).get("interval")
    return [f"{value:.4f}", f"{(ends[1] - ends[0]) / 2:.4f}" if ends else DASH]


def _items(task: dict[str, Any]) -> str:
    whole = task["items"] == task["total"]
    return f"{task['items']:,}" if whole else f"{task['items']:,} of {task['total']:,}"


def _bits(task: dict[str, Any]) -> str:
    bits = task.get("bits_per_byte")
    return f"{bits['value']:.4f}" if bits else DASH


def _compared(task: dict[str, Any]) -> list[str]:
    other = task["other"]
    if "difference" not in other:
        return [f"{other['value']:.4f}", DASH, DASH, DASH, DASH]
    sure = other["p_value"] is not None and other["p_value"] < 0.05
    detectable, retained = other["detectable"], other["retained_above_chance"]
    won, lost = (other.get(name) for name in ("only_own_right", "only_other_right"))
    return [
        f"{other['value']:.4f}",
        f"{other['difference']:+.4f}{'*' if sure else ' '}",
        f"{detectable:.4f}" if detectable else DASH,
        DASH if won is None else f"+{won} -{lost}",
        f"{retained['share']:.0%}" if retained else DASH,
    ]


def _speed(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["model", "engine", "prefill/s", "decode/s", "first token", "peak memory", "file"]]
    for row in rows:
        if row["error"] is not None:
            lines.append([row["model"], row["engine"], row["error"]])
            continue
        first = row["speeds"][0] if row["speeds"] else {"prefill": None, "decode": None}
        lines.append(
            [
                row["model"],
                row["engine"],
                _figure(first["prefill"], ",.0f"),
                _figure(first["decode"], ",.1f"),
                _figure(row["first_token_seconds"], ".3f", " s"),
                _figure(row["peak_memory_bytes"], ",.0f", " MB", 1e6),
                f"{row['file_bytes'] / 1e6:,.1f} MB" if row["file_bytes"] else DASH,
            ]
        )
    return _aligned(lines)


def _figure(figure: dict[str, float] | None, how: str, unit: str = "", scale: float = 1) -> str:
    return DASH if figure is None else f"{figure['median'] / scale:{how}}{unit}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first two to the left, numbers to the right."""
    count = max(len(line) for line in lines)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(count)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )
