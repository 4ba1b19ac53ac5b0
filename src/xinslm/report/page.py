"""The report as one HTML page without scripts or external resources; every text is escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

from xinslm.report import benchmark
from xinslm.report.compare import headlines
from xinslm.report.read import RunData
from xinslm.report.style import CSS, NUM_COLORS
from xinslm.report.svg import Series, line_chart
from xinslm.report.tables import Table, files, size, summary, timed, training
from xinslm.report.verdict import gains_and_losses


def render(run: RunData, others: Sequence[RunData], x: str, log_x: bool) -> str:
    """Write the page of `run`, with the curves and metrics of `others` for comparison."""
    runs = [run, *others]
    command = f"<pre class=command>{escape(run.command)}</pre>" if run.command else ""
    parts = [_header(run, others), _tiles(run, others)]
    parts += [_section("Summary", "".join(_table(t) for t in summary(run, others)))]
    parts += [_section("Gained and lost", _verdict(run, others))]
    parts += [_section("Benchmarks", _benchmarks(runs))]
    parts += [_section("Training", _curves(runs, x, log_x) + _table(training(runs)))]
    parts += [_section("Samples", _samples(runs)), _section("Files", _table(files(run)))]
    parts += [_section("Run it again", command + _config(run))]
    title = escape(f"{run.name}: report")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _header(run: RunData, others: Sequence[RunData]) -> str:
    compared = f" compared with {', '.join(escape(r.name) for r in others)}" if others else ""
    notes = "".join(
        f"<p class=warning>{escape(r.name)}: {escape(note)}</p>"
        for r in [run, *others]
        for note in r.notes
    )
    title = f"<h1>{escape(run.name)}</h1><p>{escape(str(run.folder))}{compared}</p>"
    return f"<header><p class=kicker>xinslm report</p>{title}{notes}</header>\n"


def _tiles(run: RunData, others: Sequence[RunData]) -> str:
    """The main metrics as tiles."""
    tiles = [
        (line.name, line.bits_per_byte, "bits per byte", "; ".join(line.meaning))
        for line in headlines(run, others)
    ]
    if run.files:
        small = min(run.files, key=lambda r: r["bytes"])
        tiles.append((small["name"], *size(small["bytes"]).split(), "smallest file"))
    cells = ""
    for name, value, unit, meaning in tiles:
        figure = f"<b>{escape(value)} <small>{escape(unit)}</small></b>"
        cells += (
            f"<div><span>{escape(str(name))}</span>{figure}<span>{escape(meaning)}</span></div>"
        )
    return f"<div class=tiles>{cells}</div>\n" if tiles else ""


def _section(title: str, content: str) -> str:
    """A section; '' if it has no content."""
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def _benchmarks(runs: Sequence[RunData]) -> str:
    """Scores on tasks, speeds, and items to open."""
    rows = [row for run in runs for row in run.benchmark]
    warnings = "".join(f"<p class=warning>{escape(note)}</p>" for note in benchmark.notes(rows))
    parts = [_table(table) for table in benchmark.tables(rows)]
    return "".join(
        [*parts, warnings, benchmark.charts(rows), *(benchmark.items(row) for row in rows)]
    )


def _verdict(run: RunData, others: Sequence[RunData]) -> str:
    """Gains and losses as two lists."""
    parts = ""
    for title, sentences in zip(("Gained", "Lost"), gains_and_losses(run, others), strict=True):
        if sentences:
            items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
            parts += f"<h3>{title}</h3><ul>{items}</ul>"
    return parts


def _table(table: Table | None) -> str:
    if table is None:
        return ""

    def row(cells: Sequence[str], tag: str) -> str:
        inner = (
            f"<{tag}{'' if i in table.left else ' class=n'}>{escape(c)}</{tag}>"
            for i, c in enumerate(cells)
        )
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    head = row(table.head, "th")
    return (
        f"<div class=scroll><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}"
    )


def _points(lines: Sequence[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    return [
        (line[x], line[y]) for line in lines if line.get(x) is not None and line.get(y) is not None
    ]


def _curves(runs: Sequence[RunData], x: str, log_x: bool) -> str:
    """Draw cross-entropy, divergence from the teacher and speed, each for all runs that have it."""
    x_label = "target tokens" if x == "tokens" else "optimizer step"
    charts = []
    for title, measured, validated in (
        ("Cross-entropy, nats per token", "ce", "validation_ce"),
        ("Divergence from the teacher, nats per token", "kd", "validation_kd"),
        ("Hidden states compared with the teacher's: relative error, or 1 - CKA", "hidden", None),
        ("Contrastive loss on hidden states (InfoNCE), nats", "contrast", None),
        ("Target tokens per second", "tokens_per_second", None),
    ):
        series = []
        for index, run in enumerate(runs):
            color = index % NUM_COLORS
            name = f"{run.name} " if len(runs) > 1 else ""
            lines = timed(run) if measured == "tokens_per_second" else run.training
            series.append(Series(f"{name}training".strip(), _points(lines, x, measured), color))
            if validated:
                series.append(
                    Series(
                        f"{name}validation",
                        _points(run.validation, x, validated),
                        color,
                        marked=True,
                    )
                )
        charts.append(line_chart(series, x_label, title, log_x, from_zero=validated is None))
    return f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""


def _samples(runs: Sequence[RunData]) -> str:
    """Show the samples of all models, grouped by prompt."""
    prompts: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    several = sum(bool(run.samples) for run in runs) > 1
    for run in runs:
        for row in run.samples:
            name = f"{row['name']} ({run.name})" if several else str(row["name"])
            prompts.setdefault(str(row.get("prompt", "")), []).append((name, row))
    parts = []
    for prompt, rows in prompts.items():
        cards = []
        for name, row in rows:
            settings = row.get("settings")
            how = (
                ", ".join(f"{k} {v}" for k, v in settings.items())
                if isinstance(settings, dict)
                else ""
            )
            between = "\n\n" if row.get("chat") else ""
            text = f"<span>{escape(prompt)}</span>{between}{escape(str(row.get('text', '')))}"
            cards.append(
                f"<article><h3>{escape(name)}</h3><blockquote>{text}</blockquote>"
                f"<p class=note>{escape(how)}</p></article>"
            )
        parts.append(f"<div class=samples>{''.join(cards)}</div>")
    return "".join(parts)


def _config(run: RunData) -> str:
    if not run.config_text:
        return ""
    return (
        "<details><summary>Resolved "
        f"configuration</summary><pre>{escape(run.config_text)}</pre></details>"
    )
