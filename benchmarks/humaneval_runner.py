"""HumanEval's reference solutions and empty completions through the runner of `xinslm benchmark`.

    python benchmarks/humaneval_runner.py ../shared/data/bench/HumanEval.jsonl.gz

All solutions must pass and no empty completion may; wall time of each, calibration of the time
limit included.
"""

import argparse
import time
from pathlib import Path

from machine import describe

from xinslm.evaluate.code.humaneval import read_problems, run_completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", type=Path)
    args = parser.parse_args()
    problems = read_problems(args.problems)
    print(describe(), flush=True)
    for name in ("reference solutions", "empty completions"):
        is_reference = name == "reference solutions"
        completions = {p.task_id: [p.canonical_solution if is_reference else ""] for p in problems}
        began = time.perf_counter()
        kinds = run_completions(problems, completions, allow=True).kinds
        print(f"{name}: {dict(kinds)} in {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
