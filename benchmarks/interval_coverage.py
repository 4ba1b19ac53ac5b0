"""Whether the interval of `xinslm benchmark --max-minutes` holds the value of all items.

    xinslm benchmark MODEL --tasks hellaswag mmlu:0 truthfulqa_mc1 truthfulqa_mc2 \
        --data ../shared/data/bench --max-minutes 40 -o scores.json
    python benchmarks/interval_coverage.py scores.json --minutes 10

The items that were scored stand for all items of the task, so the value of all is known. A part of
them is drawn 200 times in the order of `--max-minutes`; printed are the share of the intervals that
hold that value, and the median of half their width. The sizes of the parts: 10, 25 and 50 %, and
what would fit into --minutes, shared by the tasks, at the run's own speed. Several files may come
from several runs of one model.
"""

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
from machine import describe

from xinslm.evaluate.statistics import full_set_estimate
from xinslm.evaluate.statistics.order import stratified_order

SHARES = (0.1, 0.25, 0.5)


def coverage(values: np.ndarray, strata: list[str], size: int, repeats: int) -> tuple[float, float]:
    """Share of intervals that hold the mean of all values, and the median of half the width."""
    sizes, truth = dict(Counter(strata)), values.mean()
    held, widths = 0, []
    for seed in range(repeats):
        part = stratified_order(strata, seed)[:size]
        names = [strata[index] for index in part]
        interval = full_set_estimate(values[part], names, sizes).interval
        held += interval.low <= truth <= interval.high
        widths.append((interval.high - interval.low) / 2)
    return held / repeats, statistics.median(widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.scores]
    print(describe(), results[0]["model"]["name"], flush=True)
    rows = [(row, result["items"][row["task"]]) for result in results for row in result["tasks"]]
    tasks = {row["task"] for row, _ in rows}
    for row, items in rows:
        values = [item["metrics"].get(row["metric"]) for item in items]
        if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            continue
        strata = [item["task"] for item in items]
        fits = int(60 * args.minutes / len(tasks) / row["seconds"] * len(items))
        sizes = [round(share * len(items)) for share in SHARES] + [min(fits, len(items))]
        for size in sizes:
            held, width = coverage(np.array(values, float), strata, size, args.repeats)
            print(
                f"{row['task']} {row['metric']}: {size} of {len(items)} items: holds "
                f"{row['value']:.4f} in {held:.1%}, +-{width:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
