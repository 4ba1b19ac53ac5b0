"""Points with names as inline SVG: one figure of each model by another."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from xinslm.report.style import NUM_COLORS
from xinslm.report.svg import short, ticks

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 150, 14, 44


@dataclass(frozen=True)
class Point:
    """A model, or a model in an engine."""

    name: str
    x: float
    y: float
    interval: Sequence[float] | None = None
    """Of y."""


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw points, x from 0; '' if there are fewer than two."""
    if len(points) < 2:
        return ""
    right = 1.1 * max(point.x for point in points) or 1.0
    ends = [end for point in points for end in (point.interval or (point.y,))]
    low, high = min(ends), max(ends)
    margin = 0.1 * (high - low) or 0.1
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / right * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<line class="axis" x1="{LEFT}" x2="{end}" y1="{base}" y2="{base}"/>']
    for tick in ticks(low, high, 5):
        y = place(0, tick)[1]
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{short(tick)}</text>',
        ]
    for tick in ticks(0.0, right, 6):
        x = place(tick, low)[0]
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{base + 18}">{short(tick)}</text>')
    for number, point in enumerate(points):
        parts += _point(point, place(point.x, point.y), number % NUM_COLORS)
        if point.interval:
            (x, top), (_, bottom) = (place(point.x, value) for value in point.interval)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            )
    middle = (LEFT + end) / 2
    parts.append(f'<text class="label mid" x="{middle}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    title = f"{y_label} by {x_label}"
    caption = f"<figcaption><strong>{escape(title)}</strong></figcaption>"
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _point(point: Point, place: tuple[float, float], color: int) -> list[str]:
    x, y = place
    hint = f"<title>{escape(point.name)}: {point.y:.4g} at {point.x:.4g}</title>"
    return [
        f'<circle class="c{color}" cx="{x:.1f}" cy="{y:.1f}" r="5">{hint}</circle>',
        f'<text class="tick" x="{x + 9:.1f}" y="{y + 4:.1f}">{escape(point.name)}</text>',
    ]
