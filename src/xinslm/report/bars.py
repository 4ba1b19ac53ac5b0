"""Horizontal bars with intervals as inline SVG, grouped by label, one color for each series."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from xinslm.report.style import NUM_COLORS
from xinslm.report.svg import ticks

WIDTH, LEFT, RIGHT, TOP = 760, 210, 70, 8
BAR, GAP, AXIS = 14, 12, 24


@dataclass(frozen=True)
class Bar:
    """One value."""

    label: str
    """Bars with the same label form a group."""
    series: str
    """Determines the color."""
    value: float
    interval: Sequence[float] | None
    mark: float | None
    """Value to mark in the group, such as that of a guess."""


def bar_chart(bars: Sequence[Bar], title: str, line: float | None = None) -> str:
    """Draw bars from 0; '' if there are none. `line` is a value to mark in all groups."""
    if not bars:
        return ""
    groups: dict[str, list[Bar]] = {}
    for bar in bars:
        groups.setdefault(bar.label, []).append(bar)
    colors = {name: i % NUM_COLORS for i, name in enumerate(dict.fromkeys(b.series for b in bars))}
    ends = [bar.interval[1] for bar in bars if bar.interval] + [bar.value for bar in bars]
    highest = max(*ends, line or 0.0, 1e-9) * 1.05
    inner = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return LEFT + max(0.0, value) / highest * inner

    parts, y = [], float(TOP)
    for label, members in groups.items():
        middle = y + len(members) * BAR / 2 + 4
        parts.append(
            f'<text class="tick end" x="{LEFT - 8}" y="{middle:.1f}">{escape(label)}</text>'
        )
        for bar in members:
            parts += _bar(bar, y, x, colors[bar.series])
            y += BAR
        marks = {bar.mark for bar in members if bar.mark}
        parts += [_rule(x(mark), y - len(members) * BAR, y, "chance") for mark in marks]
        y += GAP
    parts += [_rule(x(line), TOP, y, "reference")] if line is not None else []
    parts += [
        f'<text class="tick mid" x="{x(tick):.1f}" y="{y + 12:.1f}">{tick:.10g}</text>'
        for tick in ticks(0.0, highest, 5)
    ]
    legend = "".join(
        f'<span class="key strong c{color}">{escape(name)}</span>' for name, color in colors.items()
    )
    caption = f"<figcaption><strong>{escape(title)}</strong><div>{legend}</div></figcaption>"
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {y + AXIS:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
    return f"<figure>{caption}{picture}</figure>"


def _bar(bar: Bar, y: float, x: Callable[[float], float], color: int) -> list[str]:
    hint = f"<title>{escape(bar.series)}: {bar.value:.4f}</title>"
    end = x(bar.value)
    parts = [
        f'<rect class="c{color}" x="{LEFT}" y="{y + 2:.1f}" width="{max(1.0, end - LEFT):.1f}" '
        f'height="{BAR - 4}">{hint}</rect>'
    ]
    if bar.interval:
        low, high = (x(end) for end in bar.interval)
        middle = y + BAR / 2
        parts.append(
            f'<line class="axis" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" '
            f'y2="{middle:.1f}"/>'
        )
        end = max(end, high)
    parts.append(f'<text class="tick" x="{end + 6:.1f}" y="{y + 11:.1f}">{bar.value:.3f}</text>')
    return parts


def _rule(x: float, top: float, bottom: float, name: str) -> str:
    return (
        f'<line class="{name}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}">'
        f"<title>{'chance' if name == 'chance' else 'equal'}</title></line>"
    )
