"""Charts are read back as XML: every point must lie where its value says."""

import math
import xml.etree.ElementTree as ET

import pytest

from xinslm.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart, short


def parse(chart: str) -> ET.Element:
    return ET.fromstring(chart)


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        for line in parse(chart).iter("polyline")
    ]


def ticks_of(chart: str, kind: str) -> list[tuple[str, float]]:
    """Label and place of the ticks: kind 'mid' for x, 'end' for y."""
    texts = [t for t in parse(chart).iter("text") if t.get("class") == f"tick {kind}"]
    return [
        (t.text, float(t.get("x" if kind == "mid" else "y")) - (0 if kind == "mid" else 4))
        for t in texts
    ]


@pytest.mark.parametrize("log_x", [False, True])
def test_points_lie_where_the_ticks_say(log_x: bool) -> None:
    values = [(100.0, 2.0), (2000.0, 4.0), (10000.0, 3.0)]
    chart = line_chart([Series("a", values, 0, marked=True)], "steps", "loss", log_x)
    x_ticks, y_ticks = ticks_of(chart, "mid"), ticks_of(chart, "end")
    assert len(x_ticks) > 2 and len(y_ticks) > 2

    def number(label: str) -> float:
        return float(label.replace("k", "000"))

    def at(value: float, ticks: list[tuple[str, float]], log: bool) -> float:
        (a, x), (b, y) = ((number(label), place) for label, place in (ticks[0], ticks[-1]))
        a, b, value = (math.log10(v) if log else v for v in (a, b, value))
        return x + (value - a) / (b - a) * (y - x)

    for (x, y), (value_x, value_y) in zip(points_of(chart)[0], values, strict=True):
        assert x == pytest.approx(at(value_x, x_ticks, log_x), abs=0.2)
        assert y == pytest.approx(at(value_y, y_ticks, False), abs=0.2)
        assert LEFT <= x <= WIDTH - RIGHT + 0.1 and TOP <= y <= HEIGHT - BOTTOM


def test_a_long_curve_is_averaged_not_thinned_out() -> None:
    values = [(float(i), 5.0 + (i % 2)) for i in range(10_000)]
    (points,) = points_of(line_chart([Series("a", values, 0)], "x", "y"))
    assert 150 < len(points) <= 320
    assert len({round(y, 1) for _, y in points}) == 1, "each stretch has the mean 5.5"


def test_the_steep_start_is_cut_off_and_said() -> None:
    values = [(float(i), 3 + 50 * math.exp(-i / 2)) for i in range(100)]
    chart = line_chart([Series("a", values, 0)], "x", "y")
    assert "the axis ends below the highest values" in chart
    assert "the axis ends" not in line_chart([Series("a", [(0, 2.0), (1, 1.0)], 0)], "x", "y")


def test_a_spike_does_not_flatten_the_curve() -> None:
    values = [(float(i), 9.0 if i == 50 else 3 - i / 100) for i in range(100)]
    chart = line_chart([Series("a", values, 0)], "x", "y")
    assert "the axis ends below the highest values" in chart
    assert max(float(label) for label, _ in ticks_of(chart, "end")) <= 3.5
    ends_high = [(float(i), 3 + i % 2 / 10 if i < 99 else 9.0) for i in range(100)]
    chart = line_chart([Series("a", ends_high, 0)], "x", "y")
    assert max(float(label) for label, _ in ticks_of(chart, "end")) > 7, "the last value is seen"


def test_a_rate_starts_at_zero() -> None:
    chart = line_chart([Series("a", [(0, 40_000.0), (1, 41_000.0)], 0)], "x", "y", from_zero=True)
    assert ticks_of(chart, "end")[0] == ("0", pytest.approx(HEIGHT - BOTTOM))


@pytest.mark.parametrize(
    "values", [[(5.0, 2.0)], [(5.0, 0.0)], [(1.0, 2.0), (2.0, 2.0)], [(0.0, 1e-9), (1e9, 1e9)]]
)
@pytest.mark.parametrize("log_x", [False, True])
def test_odd_ranges_make_a_chart(values: list, log_x: bool) -> None:
    chart = line_chart([Series("a", values, 0, marked=True)], "x", "y", log_x)
    for line in points_of(chart):
        assert all(math.isfinite(x) and math.isfinite(y) for x, y in line)


def test_what_is_not_finite_is_left_out() -> None:
    values = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 3.0)]
    assert len(points_of(line_chart([Series("a", values, 0)], "x", "y"))[0]) == 2
    assert line_chart([Series("a", values[1:3], 0)], "x", "y") == ""
    assert line_chart([Series("a", [(0, 1.0)], 0)], "x", "y", log_x=True) == ""
    assert line_chart([], "x", "y") == ""


def test_names_are_escaped() -> None:
    chart = line_chart([Series("<a & 'b'>", [(1, 2.0), (2, 3.0)], 0, marked=True)], 'x"', "<y>")
    assert "<a &" not in chart
    parse(chart)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (2.5, "2.5"),
        (300, "300"),
        (1500, "1500"),
        (40_000, "40k"),
        (2.5e6, "2.5M"),
    ],
)
def test_numbers_of_an_axis(value: float, text: str) -> None:
    assert short(value) == text
