"""Line charts as inline SVG: round ticks, a legend, values on hover; the page's CSS has the
colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
MOST_POINTS = 320
"""A longer curve is averaged over stretches of equal length."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    """Index of the page's colours: a run."""
    marked: bool = False
    """A few measured points, drawn as dots on a strong line; otherwise a fine line."""


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    from_zero: bool = False,
) -> str:
    """Draw curves into one figure; '' if no curve has a finite point (at x > 0 where x is
    logarithmic).

    `from_zero` lets the y axis begin at 0, as a rate's should.
    """
    curves = [(s, _finite(s.points, log_x)) for s in series]
    curves = [(s, points if s.marked else _averaged(points)) for s, points in curves if points]
    if not curves:
        return ""
    x_low, x_high = _spread([x for _, points in curves for x, _ in points], log_x)
    low, high, cut = _y_range([[y for _, y in points] for _, points in curves], from_zero)
    x_ticks = _log_ticks(x_low, x_high) if log_x else _ticks(x_low, x_high, 7)
    y_ticks = _ticks(low, high, 5)

    def place(x: float, y: float) -> tuple[float, float]:
        a, b, c = (math.log10(v) if log_x else v for v in (x, x_low, x_high))
        across = LEFT + (a - b) / (c - b) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by '
        f'{escape(x_label)}">'
    ]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{short(tick)}</text>')
    for tick in x_ticks:
        x, y = place(tick, low)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>'
        )
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{y + 18:.1f}">{short(tick)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label mid" x="{middle}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    inner = WIDTH - LEFT
    parts.append(
        f'<svg x="{LEFT}" y="0" width="{inner}" height="{base}" viewBox="{LEFT} 0 {inner} {base}">'
    )
    for s, points in curves:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        kind = "strong" if s.marked else "fine"
        parts.append(f'<polyline class="{kind} c{s.color}" points="{path}"/>')
        if s.marked or len(points) == 1:
            for point in points:
                x, y = place(*point)
                hint = f"<title>{escape(s.name)}: {_exact(point[1])} at {short(point[0])}</title>"
                parts.append(
                    f'<circle class="c{s.color}" cx="{x:.1f}" cy="{y:.1f}" r="3">{hint}</circle>'
                )
    parts.append("</svg></svg>")
    legend = ""
    for s, points in curves:
        kind = "strong" if s.marked else "fine"
        last = f"<b>{_exact(points[-1][1])}</b>"
        legend += f'<span class="key {kind} c{s.color}">{escape(s.name)} {last}</span>'
    note = " (the axis ends below the highest values)" if cut else ""
    caption = (
        f"<figcaption><strong>{escape(y_label)}</strong>{note}<div>{legend}</div></figcaption>"
    )
    return f"<figure>{caption}{''.join(parts)}</figure>"


def short(value: float) -> str:
    """Write a number for an axis: 0.05, 2.5, 300, 40k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.10g}{unit}"
    return f"{value:.10g}"


def _exact(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def _finite(points: Sequence[tuple[float, float]], log_x: bool) -> list[tuple[float, float]]:
    return [
        (x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)
    ]


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _spread(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Smallest and largest value, apart even where they are equal."""
    low, high = min(values), max(values)
    if low < high:
        return low, high
    return (low / 2, high * 2) if log else (low - 0.5, high + 0.5)


def _y_range(curves: Sequence[Sequence[float]], from_zero: bool) -> tuple[float, float, bool]:
    """Ends of the axis, and whether it cuts off a steep start or spikes, which would flatten the
    rest.
    """
    low, high = _spread([y for ys in curves for y in ys], False)
    if from_zero and low >= 0:
        return 0.0, 1.05 * high, False
    settled = max(max(_usual(ys[len(ys) // 8 :]), ys[-1]) for ys in curves)
    top = min(high, settled + 0.15 * (settled - low))
    cut = high - low > 1.5 * (top - low) and top > low
    top = top if cut else high
    margin = 0.05 * (top - low)
    return low - margin if low < 0 or low > margin else 0.0, top + margin, cut


def _usual(values: Sequence[float]) -> float:
    """The value that 5 % are above."""
    return sorted(values)[math.ceil(0.95 * (len(values) - 1))]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    tens = [t for t in found if math.log10(t).is_integer()]
    return tens if len(tens) > 4 else found
