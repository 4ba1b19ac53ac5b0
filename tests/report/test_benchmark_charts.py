"""Charts of the benchmark section, from rows as `xinslm benchmark` writes them."""

import re

from xinslm.report.benchmark import charts
from xinslm.report.scatter import Point, scatter


def task(value: float, bits: float, other: float | None = None) -> dict:
    found = {
        "task": "arc",
        "metric": "acc",
        "value": value,
        "interval": [value - 0.1, value + 0.1],
        "chance": 0.25,
        "items": 50,
        "total": 50,
        "bits_per_byte": {"value": bits, "interval": [bits - 0.2, bits + 0.2]},
    }
    if other is not None:
        found["other"] = {
            "value": other,
            "retained_above_chance": None,
            "bits_per_byte": {"value": 1.0, "difference": bits - 1, "interval": [0.1, 0.2]},
        }
    return found


def row(name: str, kind: str, tasks: list, speeds: dict[str, float]) -> dict:
    return {
        "name": name,
        "model": {"name": name, "path": f"runs/{name}", "kind": kind, "parameters": 100},
        "against": {"name": "teacher", "path": "runs/teacher"},
        "tasks": tasks,
        "speed": [
            {
                "model": f"runs/{model}",
                "engine": "pytorch",
                "speeds": [{"depth": 0, "decode": {"median": speed}, "prefill": None}],
            }
            for model, speed in speeds.items()
        ],
    }


def figures(page: str) -> dict[str, str]:
    """Figures by title."""
    parts = re.findall(r"<figure>.*?</figure>", page, re.S)
    return {re.search(r"<strong>(.*?)</strong>", part)[1]: part for part in parts}


def hints(figure: str) -> list[str]:
    return re.findall(r"<title>(?!chance|equal)(.*?)</title>", figure)


def test_quantization_is_compared_with_the_model_it_came_from():
    student = row("student", "folder", [task(0.5, 1.2, 0.6)], {"student": 20.0, "teacher": 10.0})
    small = row("4-bit", "quantized", [task(0.4, 1.25, 0.6)], {"4-bit": 40.0, "teacher": 10.0})
    found = figures(charts([student, small]))
    (damage,) = (part for title, part in found.items() if "quantization adds" in title)
    assert hints(damage) == ["4-bit: 0.0500"]
    (bits,) = (part for title, part in found.items() if "less is better" in title)
    assert hints(bits) == ["student: 1.2000", "teacher: 1.0000", "4-bit: 1.2500"]
    (speed,) = (part for title, part in found.items() if "per second" in title)
    assert hints(speed) == [
        "student, pytorch: 0.5 at 20",
        "teacher, pytorch: 0.6 at 10",
        "4-bit, pytorch: 0.4 at 40",
    ]


def test_other_items_or_another_size_are_not_quantization_damage():
    small = row("4-bit", "quantized", [task(0.4, 1.25, 0.6)], {})
    part = row("student", "folder", [task(0.5, 1.2, 0.6) | {"items": 49}], {})
    other = row("other", "folder", [task(0.5, 1.2, 0.6)], {})
    other["model"]["parameters"] = 99
    for before in (part, other):
        assert not [t for t in figures(charts([before, small])) if "quantization adds" in t]


def test_a_task_without_choices_has_no_bits():
    alone = row("m", "folder", [task(0.5, 1.0) | {"bits_per_byte": None}], {}) | {"against": None}
    found = figures(charts([alone]))
    assert list(found) == ["Score, with the interval of 95 %"]


def test_points_lie_where_their_values_are():
    assert scatter([Point("alone", 1.0, 1.0)], "x", "y") == ""
    figure = scatter([Point("a", 10.0, 0.2, (0.1, 0.3)), Point("b<", 20.0, 0.4)], "x", "y")
    (ax, ay), (bx, by) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', figure)
    assert float(bx) - 58 == 2 * (float(ax) - 58)  # from zero
    assert float(by) < float(ay)
    assert "b&lt;" in figure
