"""The report as Markdown, for a model card or a pull request: the same tables, without the
curves.
"""

import re
from collections.abc import Sequence
from html import escape

from xinslm.display import printable
from xinslm.report import benchmark
from xinslm.report.compare import headlines
from xinslm.report.read import RunData
from xinslm.report.tables import Table, files, summary, training
from xinslm.report.verdict import gains_and_losses


def render(run: RunData, others: Sequence[RunData]) -> str:
    """Write the report of `run`, with the metrics of `others` for comparison."""
    parts = [f"# {_inline(run.name)}"]
    parts += [f"> {_inline(r.name)}: {_inline(note)}" for r in [run, *others] for note in r.notes]
    parts += [
        f"**{_inline(line.name)}**: {line.bits_per_byte} bits per byte"
        + "".join(f"; {_inline(phrase)}" for phrase in line.meaning)
        for line in headlines(run, others)
    ]
    if tables := [_table(t) for t in summary(run, others)]:
        parts += ["## Summary", *tables]
    for title, sentences in zip(("Gained", "Lost"), gains_and_losses(run, others), strict=True):
        if sentences:
            parts += [f"## {title}", "\n".join(f"- {_inline(text)}" for text in sentences)]
    measured = [row for r in [run, *others] for row in r.benchmark]
    if found := [_table(t) for t in benchmark.tables(measured)]:
        remarks = "\n".join(f"- {_inline(note)}" for note in benchmark.notes(measured))
        parts += ["## Benchmarks", *found, *([remarks] if remarks else [])]
    if trained := training([run, *others]):
        parts += ["## Training", _table(trained)]
    rows = [(r, row) for r in [run, *others] for row in r.samples]
    if rows:
        parts.append("## Samples")
    for r, row in rows:
        name = f"{row['name']} ({r.name})" if others else str(row["name"])
        between = "\n\n" if row.get("chat") else ""
        text = str(row.get("prompt", "")) + between + str(row.get("text", ""))
        parts.append(f"**{_inline(name)}**\n\n{_preformatted(text)}")
    if made := files(run):
        parts += ["## Files", _table(made)]
    if run.command:
        parts += ["## Run it again", _preformatted(run.command)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rule = [":--" if i in table.left else "--:" for i in range(len(table.head))]
    lines = [table.head, rule, *table.rows]
    text = "\n".join(
        f"| {' | '.join(_inline(cell) if line is not rule else cell for cell in line)} |"
        for line in lines
    )
    return f"{text}\n\n{_inline(table.note)}" if table.note else text


def _inline(text: str) -> str:
    """Escape a text for Markdown and HTML; entities work in every dialect."""
    marked = re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(text.split()))
    return escape(printable(marked), quote=False)


def _preformatted(text: str) -> str:
    """Wrap a text in a block that it cannot end in any Markdown dialect."""
    return f"<pre>\n{escape(printable(text), quote=False)}\n</pre>"
