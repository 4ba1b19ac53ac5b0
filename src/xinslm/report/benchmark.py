"""The benchmark section of a report: scores with intervals, retained shares, speed against
quality, and items to open.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from xinslm.report.bars import Bar, bar_chart
from xinslm.report.scatter import Point, scatter
from xinslm.report.tables import DASH, Table, size

Row = dict[str, Any]
QUANTIZED = ("quantized", "gguf")
"""Kinds of models whose weights are rounded."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each measured model a table of its tasks, and one of its speeds."""
    found = []
    for row in rows:
        if row["tasks"]:
            found.append(_tasks(row))
        if row["speed"]:
            found.append(_speed(row["speed"]))
    return found


def charts(rows: Sequence[Row]) -> str:
    """Scores of all models by task, the share of the other model's score that was kept, what
    quantization costs, and speed against quality.
    """
    parts = [
        bar_chart(_scores(rows), "Score, with the interval of 95 %"),
        bar_chart(_retained(rows), "Share of the other model's score above chance", line=1.0),
        bar_chart(_bits(rows), "Bits per byte of the right answer (less is better)"),
        bar_chart(_damage(rows), "Bits per byte that quantization adds to the right answer"),
        scatter(_speed_points(rows), "tokens generated per second", "Mean score of the tasks"),
    ]
    return f"<div class=charts>{''.join(parts)}</div>" if any(parts) else ""


def items(row: Row) -> str:
    """Items of each task, each with the question, the choices and both models' numbers."""
    names = [row["model"]["name"]] + ([row["against"]["name"]] if row["against"] else [])
    parts = []
    for task, samples in row["samples"].items():
        cards = "".join(_item(sample, names) for sample in samples)
        title = f"<summary>{escape(task)}: {len(samples)} items</summary>"
        parts.append(f"<details>{title}{cards}</details>")
    return "".join(parts)


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know about the scores."""
    return [f"{row['name']}: {note}." for row in rows for note in row["notes"]]


def _main_rows(row: Row) -> list[Row]:
    """One metric a task: acc_norm if there is one, else the first."""
    chosen: dict[str, Row] = {}
    for task in row["tasks"]:
        if task["metric"] == "acc_norm" or task["task"] not in chosen:
            chosen[task["task"]] = task
    return list(chosen.values())


def _tasks(row: Row) -> Table:
    other = row["against"]
    head = ["Task", "Metric", "Examples", "Items", row["model"]["name"], "Interval", "Bits/byte"]
    if other is not None:
        head += [other["name"], "Difference", "p", "Flips", "Retained"]
    lines = []
    for task in row["tasks"]:
        count = f"{task['items']:,}"
        whole = count if task["items"] == task["total"] else f"{count} of {task['total']:,}"
        bits = task.get("bits_per_byte")
        cells = [task["task"], task["metric"], str(task["num_fewshot"]), whole]
        cells += [*_value(task), f"{bits['value']:.4f}" if bits else DASH]
        lines.append(cells + (_compared(task["other"]) if other is not None else []))
    settings = row["settings"]
    sentences = [
        f"Computed in {settings['dtype']}.",
        "Interval: 95 %; of all items where only a part was scored, else of other items like "
        "these.",
    ]
    if other is not None:
        sentences += [
            "p: McNemar's exact test for right and wrong answers, else a paired t-test. Flips: "
            "items that only the one or only the other model answers right. Retained: share of "
            "the other model's score above chance."
        ]
        smallest = [t["other"].get("detectable") for t in row["tasks"]]
        known = [x for x in smallest if x]
        if known:
            limits = sorted({f"{min(known):.3f}", f"{max(known):.3f}"})
            sentences.append(
                f"Differences below {' to '.join(limits)} cannot be seen with these items "
                "(power .8)."
            )
    return Table(head, lines, " ".join(sentences), left=(0, 1))


def _value(task: Row) -> list[str]:
    estimate = task.get("full_set")
    value = task["value"] if estimate is None else estimate["value"]
    ends = (estimate or task).get("interval")
    return [f"{value:.4f}", f"{ends[0]:.3f}-{ends[1]:.3f}" if ends else DASH]


def _compared(other: Row) -> list[str]:
    cells = [f"{other['value']:.4f}"]
    if "difference" not in other:
        return cells + [DASH] * 4
    p, retained = other["p_value"], other["retained_above_chance"]
    cells += [f"{other['difference']:+.4f}", DASH if p is None else f"{p:.3f}"]
    known = "only_own_right" in other
    cells.append(f"+{other['only_own_right']} -{other['only_other_right']}" if known else DASH)
    return [*cells, f"{retained['share']:.0%}" if retained else DASH]


def _speed(rows: Sequence[Row]) -> Table:
    depths = sorted({speed["depth"] for row in rows for speed in row["speeds"]})
    head = ["Model", "Engine", *(f"Prefill at {d}" for d in depths)]
    head += [*(f"Decode at {d}" for d in depths), "First token", "Peak memory", "File", "Energy"]
    lines = []
    for row in rows:
        if row["error"] is not None:
            lines.append([row["model"], row["engine"], row["error"], *[DASH] * (len(head) - 3)])
            continue
        by_depth = {speed["depth"]: speed for speed in row["speeds"]}
        cells = [row["model"], row["engine"]]
        for kind, how in (("prefill", ",.0f"), ("decode", ",.1f")):
            cells += [_median(by_depth.get(depth, {}).get(kind), how) for depth in depths]
        memory = row["peak_memory_bytes"]
        cells += [
            _median(row["first_token_seconds"], ".3f", " s"),
            size(memory["median"]) if memory else DASH,
            size(row["file_bytes"]),
            _median(row["energy_joules"], ",.0f", " J"),
        ]
        lines.append(cells)
    threads = {row["threads"] for row in rows if row["threads"]}
    note = f"Tokens per second, medians; {'/'.join(map(str, sorted(threads)))} threads."
    if any(row["noisy"] for row in rows):
        note += " Noisy: repetitions differ by more than 25 %."
    return Table(head, lines, note, left=(0, 1))


def _median(figure: Row | None, how: str, unit: str = "") -> str:
    return DASH if figure is None else f"{figure['median']:{how}}{unit}"


def _scores(rows: Sequence[Row]) -> list[Bar]:
    bars = []
    for row in rows:
        for task in _main_rows(row):
            ends = (task.get("full_set") or task).get("interval")
            label = f"{task['task']} {task['metric']}"
            value = (task.get("full_set") or task)["value"]
            bars.append(Bar(label, row["model"]["name"], value, ends, task.get("chance")))
            if row["against"]:
                bars.append(Bar(label, row["against"]["name"], task["other"]["value"], None, None))
    return [bar for bar in bars if 0 <= bar.value <= 1]


def _retained(rows: Sequence[Row]) -> list[Bar]:
    bars = []
    for row in rows:
        for task in _main_rows(row):
            share = (task.get("other") or {}).get("retained_above_chance")
            if share:
                ends = [share["interval"]["low"], share["interval"]["high"]]
                name = row["model"]["name"]
                bars.append(Bar(task["task"], name, share["share"], ends, None))
    return bars


def _bits(rows: Sequence[Row]) -> list[Bar]:
    """Of the right answers, by task; the other model's once for each number of items."""
    bars, seen = [], set()
    for row in rows:
        for task in _main_rows(row):
            found = task.get("bits_per_byte")
            if not found:
                continue
            name = row["model"]["name"]
            bars.append(Bar(task["task"], name, found["value"], found["interval"], None))
            other = (task.get("other") or {}).get("bits_per_byte")
            rival = (row["against"] or {}).get("name", "")
            key = task["task"], rival, task["items"]
            if other and key not in seen:
                bars.append(Bar(task["task"], rival, other["value"], None, None))
                seen.add(key)
    return bars


def _damage(rows: Sequence[Row]) -> list[Bar]:
    """Difference in bits per byte between a quantized model and the model it came from: a row of
    the same number of parameters with the same items.
    """
    bars = []
    for row in rows:
        full = next((r for r in rows if _is_origin(r["model"], row["model"])), None)
        if row["model"].get("kind") not in QUANTIZED or full is None:
            continue
        before = {(t["task"], t["items"]): t.get("bits_per_byte") for t in _main_rows(full)}
        for task in _main_rows(row):
            old, new = before.get((task["task"], task["items"])), task.get("bits_per_byte")
            if old and new:
                name = row["model"]["name"]
                bars.append(Bar(task["task"], name, new["value"] - old["value"], None, None))
    return bars


def _is_origin(full: Row, small: Row) -> bool:
    same = full.get("parameters") == small.get("parameters")
    return same and full.get("kind") not in QUANTIZED


def _speed_points(rows: Sequence[Row]) -> list[Point]:
    """Decoding speed at the smallest depth and mean main score, of each model and engine."""
    points = []
    for row in rows:
        tasks = _main_rows(row)
        scores = {row["model"]["path"]: (row["model"], [task["value"] for task in tasks])}
        if row["against"]:
            other = [task["other"]["value"] for task in tasks]
            scores[row["against"]["path"]] = (row["against"], other)
        for speed in row["speed"]:
            model, numbers = scores.get(speed["model"], (None, None))
            measured = [depth["decode"] for depth in speed["speeds"] if depth["decode"]]
            if model and numbers and measured:
                name = f"{model['name']}, {speed['engine']}"
                points.append(Point(name, measured[0]["median"], sum(numbers) / len(numbers)))
    return list({point.name: point for point in points}.values())


def _item(sample: Row, names: Sequence[str]) -> str:
    """A question with its choices, or with both answers."""
    prompt = f"<blockquote>{escape(sample.get('prompt', '')[-1500:])}</blockquote>"
    other = sample.get("other")
    sides = [sample, other] if other else [sample]
    if sample.get("choices"):
        body = _choices(sample, sides, names)
    else:
        body = "".join(
            f"<h4>{escape(name)}{escape(_score(side))}</h4>"
            f"<blockquote>{escape(' '.join(side['answers']))}</blockquote>"
            for name, side in zip(names, sides, strict=False)
            if side.get("answers")
        )
    return f"<article><h3>{escape(sample['task'])} {sample['index']}</h3>{prompt}{body}</article>"


def _score(side: Row) -> str:
    numbers = {k: v for k, v in side["metrics"].items() if isinstance(v, int | float)}
    return ": " + ", ".join(f"{k} {v:.3g}" for k, v in numbers.items())


def _choices(sample: Row, sides: Sequence[Row], names: Sequence[str]) -> str:
    head = "".join(f"<th class=n>{escape(name)}</th>" for name in names[: len(sides)])
    lines = ""
    for number, choice in enumerate(sample["choices"]):
        right = " ✓" if number == sample.get("right") else ""
        cells = ""
        for side in sides:
            values = side["log_likelihoods"]
            best = " <b>←</b>" if values[number] == max(values) else ""
            cells += f"<td class=n>{values[number]:.2f}{best}</td>"
        lines += f"<tr><td>{escape(choice)}{right}</td>{cells}</tr>"
    head = f"<thead><tr><th>Choice (✓ right; ← most likely)</th>{head}</tr></thead>"
    return f"<div class=scroll><table>{head}<tbody>{lines}</tbody></table></div>"
