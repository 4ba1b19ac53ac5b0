"""Line charts as inline SVG: round ticks, a legend, values on hover. The page's CSS has the
colors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
MOST_POINTS = 320
"""A longer curve is averaged over intervals of equal length."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    """Index of the page's color, one for each run."""
    marked: bool = False
    """Draw a thick line with dots, for a few measured points; otherwise a thin line."""


@dataclass(frozen=True)
class _Axes:
    """Limits of both axes, in the units of the data."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the data to the figure."""
        a, b, c = (math.log10(v) if self.log_x else v for v in (x, *self.x))
        low, high = self.y
        across = LEFT + (a - b) / (c - b) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    from_zero: bool = False,
) -> str:
    """Draw curves into one figure; '' if no curve has a finite point (at x > 0 if x is
    logarithmic).

    `from_zero` starts the y axis at 0.
    """
    curves = [(s, _finite(s.points, log_x)) for s in series]
    curves = [(s, points if s.marked else _averaged(points)) for s, points in curves if points]
    if not curves:
        return ""
    x_range = _spread([x for _, points in curves for x, _ in points], log_x)
    low, high, cut = _y_range([[y for _, y in points] for _, points in curves], from_zero)
    axes = _Axes(x_range, (low, high), log_x)
    base, inner = HEIGHT - BOTTOM, WIDTH - LEFT
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by '
        f'{escape(x_label)}">',
        *_grid(axes, x_label),
        f'<svg x="{LEFT}" y="0" width="{inner}" height="{base}" viewBox="{LEFT} 0 {inner} {base}">',
        *(_curve(s, points, axes) for s, points in curves),
        "</svg></svg>",
    ]
    legend = "".join(
        f'<span class="key {_kind(s)} c{s.color}">{escape(s.name)} '
        f"<b>{_exact(points[-1][1])}</b></span>"
        for s, points in curves
    )
    note = " (the axis ends below the highest values)" if cut else ""
    caption = (
        f"<figcaption><strong>{escape(y_label)}</strong>{note}<div>{legend}</div></figcaption>"
    )
    return f"<figure>{caption}{''.join(parts)}</figure>"


def _grid(axes: _Axes, x_label: str) -> list[str]:
    """Grid lines, both axes with their ticks, the label of x."""
    parts = []
    for tick in ticks(*axes.y, 5):
        _, y = axes.place(axes.x[0], tick)
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{short(tick)}</text>',
        ]
    for tick in _log_ticks(*axes.x) if axes.log_x else ticks(*axes.x, 7):
        x, y = axes.place(tick, axes.y[0])
        parts += [
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>',
            f'<text class="tick mid" x="{x:.1f}" y="{y + 18:.1f}">{short(tick)}</text>',
        ]
    base, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    return [
        *parts,
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>',
        f'<text class="label mid" x="{middle}" y="{HEIGHT - 6}">{escape(x_label)}</text>',
    ]


def _curve(series: Series, points: Sequence[tuple[float, float]], axes: _Axes) -> str:
    """One curve, with dots if it is marked or a single point."""
    places = [axes.place(*point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="{_kind(series)} c{series.color}" points="{path}"/>']
    if series.marked or len(points) == 1:
        for (x, y), point in zip(places, points, strict=True):
            hint = f"<title>{escape(series.name)}: {_exact(point[1])} at {short(point[0])}</title>"
            parts.append(
                f'<circle class="c{series.color}" cx="{x:.1f}" cy="{y:.1f}" r="3">{hint}</circle>'
            )
    return "".join(parts)


def _kind(series: Series) -> str:
    return "strong" if series.marked else "fine"


def short(value: float) -> str:
    """Format a number for an axis: 0.05, 2.5, 300, 40k, 1.5M."""
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
    """Smallest and largest value, made different if they are equal."""
    low, high = min(values), max(values)
    if low < high:
        return low, high
    return (low / 2, high * 2) if log else (low - 0.5, high + 0.5)


def _y_range(curves: Sequence[Sequence[float]], from_zero: bool) -> tuple[float, float, bool]:
    """Return the limits of the axis, and whether they cut off a steep start or spikes, which would
    flatten the rest.
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
    """The 95th percentile."""
    return sorted(values)[math.ceil(0.95 * (len(values) - 1))]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between low and high."""
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
