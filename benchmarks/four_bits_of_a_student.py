"""What 4 bits cost the demo's student, and what each way to lose less brings.

    make demo
    python benchmarks/four_bits_of_a_student.py demo-run --work /tmp/four-bits

The student of `xinslm demo` is quantized by GPTQ, by GPTAQ, and by GPTAQ with trained scales, each
calibrated on the demo's answers. Two more students learn for one more epoch from the same cache, one
of them with `--quantization-aware`, at equal steps, rate and seed. Bits per byte on the demo's
held-out answers and on its paragraphs of other text. One row each, by seed; results are kept in the
work folder, so an interrupted run goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from machine import describe

import xinslm
from xinslm.distill.config import DistillConfig
from xinslm.evaluate.config import EvaluateConfig
from xinslm.losses.config import LossConfig
from xinslm.quantize.config import QuantizeConfig

SCALE_STEPS = 60
ROWS, LENGTH = 32, 256
"""Of the calibration, as in the demo."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of `xinslm demo`")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(describe(), flush=True)
    table = Table(options.demo, options.work / "results.jsonl")
    table.measure("student", 0, lambda: options.demo / "student")
    for seed in options.seeds:
        run(options.demo, options.work, seed, table)


def run(demo: Path, work: Path, seed: int, table: "Table") -> None:
    """All arms of one seed."""
    data = demo / "answers" / "data"

    def quantized(model: Path, name: str, **changes: Any) -> Path:
        rows: dict[str, Any] = {
            "data_path": data,
            "num_calibration_samples": ROWS,
            "max_seq_length": LENGTH,
            "seed": seed,
            "force": True,
        }
        folder = work / f"{name}-{seed}"
        print(xinslm.run(QuantizeConfig(model, folder, **(rows | changes))).describe(), flush=True)
        return folder

    def trained(aware: bool) -> Path:
        folder = work / f"longer-{aware}-{seed}"
        if not (folder / "config.json").is_file():
            config = DistillConfig(
                cache=demo / "answers" / "cache",
                data_path=data,
                output_dir=folder,
                init_from=demo / "student",
                max_seq_length=512,
                batch_size=2,
                learning_rate=1e-4,
                warmup_ratio=0.1,
                num_epochs=1,
                eval_steps=1000,
                max_eval_samples=4,
                quantization_aware=aware,
                loss=LossConfig(alpha=0.5, beta=0.5),
                seed=seed,
                force=True,
            )
            xinslm.run(config)
        return folder

    student = demo / "student"
    table.measure("nearest, as llama.cpp", seed, lambda: quantized(student, "a", method="absmax"))
    table.measure("GPTQ", seed, lambda: quantized(student, "gptq", method="gptq"))
    table.measure("GPTAQ", seed, lambda: quantized(student, "gptaq"))
    steps = {"scale_steps": SCALE_STEPS}
    name = f"GPTAQ, {SCALE_STEPS} scale steps"
    table.measure(name, seed, lambda: quantized(student, "scales", **steps))
    table.measure("one more epoch", seed, lambda: trained(False))
    table.measure("one more epoch, GPTAQ", seed, lambda: quantized(trained(False), "longer-gptaq"))
    table.measure("one more epoch at 4 bits", seed, lambda: quantized(trained(True), "aware"))


class Table:
    """Rows in a file; a row that is there is not measured again."""

    def __init__(self, demo: Path, path: Path) -> None:
        self.texts = (demo / "held-out" / "text.jsonl", demo / "paragraphs.jsonl")
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = [json.loads(line) for line in lines]

    def measure(self, arm: str, seed: int, make: Any) -> None:
        """Make a model and measure it on both texts, unless the row exists."""
        found = [row for row in self.rows if (row["arm"], row["seed"]) == (arm, seed)]
        if not found:
            start = time.perf_counter()
            model = make()
            seconds = time.perf_counter() - start
            bits = [
                xinslm.run(EvaluateConfig(model, (str(text),))).bits_per_byte for text in self.texts
            ]
            found = [{"arm": arm, "seed": seed, "bits_per_byte": bits, "seconds": round(seconds)}]
            self.rows += found
            with open(self.path, "a") as file:
                file.write(json.dumps(found[0]) + "\n")
        row = found[0]
        cells = " | ".join(f"{value:.4f}" for value in row["bits_per_byte"])
        print(f"| {row['arm']} | {row['seed']} | {cells} | {row['seconds']} |", flush=True)


if __name__ == "__main__":
    main()
