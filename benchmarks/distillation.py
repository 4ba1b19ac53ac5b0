"""The whole table of the distillation core in docs/results.md, by one command.

    python benchmarks/distillation.py --data ../shared/data --work /tmp/core --peer-python
    trl-venv/bin/python

Every part can be run by itself; each stores its figures in WORK/figures.json, from which the table
is printed. The peer's environment: python3 -m venv trl-venv && trl-venv/bin/pip install
torch==2.13.0 && trl-venv/bin/pip install trl==1.16.0
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from machine import describe
from sides import FIGURES

HERE = Path(__file__).parent


def span(values: list[float]) -> str:
    """Median and range of [median, least, largest], or of sorted values."""
    middle, low, high = (
        values if values[0] != min(values) else (values[len(values) // 2], values[0], values[-1])
    )
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def table(figures: dict) -> list[str]:
    """Rows of the table: figure, at least, aim, here."""
    equal, ragged = figures["tokens/s, equal"], figures["tokens/s, ragged"]
    over, memory = (
        figures["step time over plain cross-entropy"],
        figures["memory of the loss against ours"],
    )
    share, wall = (
        figures["share of the gain of full distillation"],
        figures["wall time to GKD's final loss"],
    )
    rounds = figures["on-policy tokens/s, 128 + 128"]
    ratios = [value for key, value in ragged.items() if key.startswith("ratio to")]
    rows = [
        ("steady tokens/s against GKD, equal lengths", "2.3x", "3x", span(equal["ratio to gkd"])),
        (
            "the same with ragged chat lengths, the peer's better batch",
            "4x",
            "6x",
            span(min(ratios)),
        ),
        ("step time over plain cross-entropy", "1.05", "1.02", span(over["one cache"])),
        ("peak memory of loss and backward, GKD over ours", "15x", "35x", f"{memory['gkd']:.1f}x"),
        (
            "cache bytes a position",
            "41",
            "29",
            ", ".join(f"{v} ({k})" for k, v in figures["cache bytes a position"].items()),
        ),
        (
            "share of the gain kept",
            "95 %",
            "98 %",
            ", ".join(
                f"{row['share']:.1%} ({name})"
                for name, row in share.items()
                if name not in ("CE", "full")
            ),
        ),
        (
            "wall time to GKD's final validation loss",
            "3x",
            "10x",
            ", ".join(
                f"{row['ratio']:.1f}x ({way}{'' if row['reached'] else ', not reached'})"
                for way, row in wall["ours"].items()
            ),
        ),
        (
            "gradient error at T=2",
            "0.2",
            "0.05",
            "; ".join(
                f"{way}: "
                f"{', '.join(f'{error:.3f} ({student})' for student, error in errors.items())}"
                for way, errors in figures["gradient error at T=2"].items()
            ),
        ),
        ("on-policy tokens/s against GKD's defaults", "10x", "30x", span(rounds["ratio to gkd"])),
        (
            "three teachers against one, step time",
            "1.05",
            "1.00",
            span(figures["three teachers against one"]["ratio"]),
        ),
        ("kill -9 and resume", "1e-6", "bit for bit", json.dumps(figures["kill -9"])),
    ]
    return [
        "| figure | at least | aim | here |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument(
        "--only-table", action="store_true", help="print the table of what was measured before"
    )
    args = parser.parse_args()
    common = ["--data", str(args.data), "--work", str(args.work)]
    peer = ["--peer-python", args.peer_python]
    if not args.only_table:
        for script in (
            ["against_gkd.py", *common, *peer],
            ["loss_accuracy.py", *common],
            ["onpolicy.py", *common, *peer],
            ["time_to_loss.py", *common, *peer],
            ["kills.py", *common],
            ["quality_of_cache.py", *common],
        ):
            print(f"\n== {' '.join(script)}", flush=True)
            subprocess.run([sys.executable, str(HERE / script[0]), *script[1:]], check=True)
    print(f"\n{describe()}\n")
    print("\n".join(table(json.loads((args.work / FIGURES).read_text()))))


if __name__ == "__main__":
    main()
