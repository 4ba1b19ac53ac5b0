"""The tree scorer against lm-evaluation-harness's own model, HFLM, on the same weights and items.

    python benchmarks/against_hflm.py MODEL --data ../shared/data/bench --part values
    python benchmarks/against_hflm.py MODEL --data ../shared/data/bench --part speed

MODEL is a model folder that transformers reads. `values` compares all log-likelihoods and metrics
in float64 on random items of each task (a part of MMLU's subjects); `speed` compares wall time,
start-up included, the time to the first forward pass, and peak memory in float32, each side in
processes of its own, in both orders, HFLM at its best batch size of those given.
"""

import argparse
import contextlib
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machine import describe

MANY = ["anatomy", "astronomy", "college_biology", "high_school_psychology", "virology"]
SETS = {
    "hellaswag": (["hellaswag"], None),
    "mmlu_many": ([f"mmlu_{subject}" for subject in MANY], 5),
    "mmlu": (["mmlu_anatomy", "mmlu_virology"], 5),
    "truthfulqa": (["truthfulqa_mc1", "truthfulqa_mc2"], None),
    "all": (["hellaswag", "mmlu_anatomy", "mmlu_virology", "truthfulqa_mc1", "truthfulqa_mc2"], 5),
}


def chosen(names: list[str], count: int, data: Path) -> dict[str, list[int]]:
    """Random items of each task; the same questions in both TruthfulQA tasks."""
    from xinslm.evaluate.harness.tasks import load_tasks

    loaded = load_tasks(names, data)
    rng = np.random.default_rng(0)
    sizes = {name: len(task.eval_docs) for name, task in loaded.tasks.items()}
    # sorted: the harness names the items of an unsorted list wrongly
    found = {n: sorted(rng.permutation(size)[:count].tolist()) for n, size in sizes.items()}
    for name in found:
        if name == "truthfulqa_mc2" and "truthfulqa_mc1" in found:
            found[name] = found["truthfulqa_mc1"]
    return found


class FirstForward:
    """Seconds from the start of the process to the first call of a module, on the clock and of CPU.

    Nothing but a forward pass calls a module: neither loading a model nor reading a task does.
    """

    def __init__(self, began: float) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook

        self.began, self.wall, self.cpu = began, math.nan, math.nan
        self._handle = register_module_forward_pre_hook(self)

    def __call__(self, module: object, inputs: object) -> None:
        self.wall, self.cpu = time.time() - self.began, time.process_time()
        self._handle.remove()


def task_folders() -> list[str]:
    import lm_eval

    root = lm_eval.__path__[0] + "/tasks/"
    return [root + name for name in ("hellaswag", "mmlu/default", "truthfulqa")]


def run_hflm(args: argparse.Namespace, names: list[str], shots: int | None) -> dict:
    """`lm_eval.simple_evaluate` with HFLM; the harness indexes only the folders it needs."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xinslm.evaluate.harness.local_data import local_datasets

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
    items, samples, results = json.loads(args.items), {}, {}
    for wanted in (True, False):  # `num_fewshot` holds for all tasks of a call
        part = [name for name in names if name.startswith("mmlu") == wanted]
        if not part:
            continue
        with local_datasets(args.data):
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=part,
                num_fewshot=shots if wanted else None,
                samples={name: items[name] for name in part},
                bootstrap_iters=0,
                task_manager=lm_eval.tasks.TaskManager(
                    include_defaults=False, include_path=task_folders()
                ),
            )
        samples |= found["samples"]
        results |= found["results"]
    values = {
        name: {str(row["doc_id"]): [float(r[0][0]) for r in row["resps"]] for row in samples[name]}
        for name in names
    }
    metrics = {
        name: {k.removesuffix(",none"): v for k, v in results[name].items() if "," in k}
        for name in names
    }
    return {"values": values, "metrics": metrics, "seconds": time.perf_counter() - began}


def run_ours(args: argparse.Namespace, names: list[str], shots: int | None) -> dict:
    """The same items with `xinslm benchmark`'s own functions."""
    from xinslm.evaluate.harness.model import XinslmLM
    from xinslm.evaluate.harness.run import score_tasks
    from xinslm.evaluate.harness.tasks import load_tasks

    began = time.perf_counter()
    lm = XinslmLM(str(args.model), device="cpu", dtype=args.dtype)
    labels = [f"{n}:{shots}" if shots and n.startswith("mmlu") else n for n in names]
    items = json.loads(args.items)
    keys = {name: [(name, index) for index in items[name]] for name in names}
    scores = score_tasks(lm, load_tasks(labels, args.data), chosen=keys)
    values = {s.name: {str(i.index): i.log_likelihoods for i in s.items} for s in scores}
    counts = lm.scorer.counts
    return {
        "values": values,
        "metrics": {s.name: s.metrics for s in scores},
        "seconds": time.perf_counter() - began,
        "requested_tokens": counts.requested_tokens,
        "computed_tokens": counts.computed_tokens,
    }


def child(args: argparse.Namespace) -> None:
    """One side, in this process."""
    from xinslm.evaluate.harness.start import no_collection

    names, shots = SETS[args.child]
    # as `xinslm benchmark` imports PyTorch; HFLM's user has no such thing
    with no_collection() if args.side == "ours" else contextlib.nullcontext():
        first = FirstForward(args.began)
    found = (run_hflm if args.side == "hflm" else run_ours)(args, names, shots)
    found |= {"first_wall": first.wall, "first_cpu": first.cpu}
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.result).write_text(json.dumps(found))


def start(args: argparse.Namespace, name: str, side: str, dtype: str, items: dict) -> dict:
    """Run one side in a process of its own; its wall time includes the start of Python."""
    result = args.work / f"{name}-{side}.json"
    command = [sys.executable, __file__, str(args.model), "--data", str(args.data)]
    command += ["--child", name, "--side", side, "--dtype", dtype, "--items", json.dumps(items)]
    command += ["--result", str(result), "--batch", str(args.batch)]
    began = time.perf_counter()
    command += ["--began", str(time.time())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(result.read_text()) | {"wall": time.perf_counter() - began}


def compare(ours: dict, other: dict) -> tuple[int, float, bool]:
    """Number of log-likelihoods, largest difference, whether all metrics are equal."""
    differences = [
        abs(a - b)
        for name, items in other["values"].items()
        for index, values in items.items()
        for a, b in zip(ours["values"][name][index], values, strict=True)
    ]
    same = all(
        abs(ours["metrics"][name][metric] - value) < 1e-12
        for name, metrics in other["metrics"].items()
        for metric, value in metrics.items()
        if metric in ours["metrics"][name]
    )
    return len(differences), max(differences), same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=["values", "speed"], default="values")
    parser.add_argument("--sets", nargs="*", default=["hellaswag", "mmlu", "truthfulqa"])
    parser.add_argument("--count", type=int, default=50, help="items of each task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="HFLM's batch size")
    parser.add_argument("--work", type=Path, default=Path("/tmp/against_hflm"))
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    for name in ("child", "side", "dtype", "items", "result"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    print(describe(), flush=True)
    for name in args.sets:
        items = chosen(SETS[name][0], args.count, args.data)
        if args.part == "values":
            other, ours = (start(args, name, side, "float64", items) for side in ("hflm", "ours"))
            count, worst, same = compare(ours, other)
            print(f"{name}: {count} log-likelihoods, largest difference {worst:.2g}, ", end="")
            print(f"metrics {'equal' if same else 'DIFFERENT'}", flush=True)
            continue
        sides: dict[str, list[dict]] = {"hflm": [], "ours": []}
        for number in range(args.rounds):
            for side in ("hflm", "ours") if number % 2 else ("ours", "hflm"):
                sides[side].append(start(args, name, side, "float32", items))
        count, worst, _ = compare(sides["ours"][0], sides["hflm"][0])
        ratios = [a["wall"] / b["wall"] for a, b in zip(sides["hflm"], sides["ours"], strict=True)]
        memory, wall, cpu = (
            [statistics.median(r[key] for r in sides[side]) for side in ("hflm", "ours")]
            for key in ("peak_mb", "first_wall", "first_cpu")
        )
        first = sides["ours"][0]
        shared = first["requested_tokens"] / first["computed_tokens"]
        print(
            f"{name}: {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) in "
            f"wall time; tokens {shared:.2f}x; peak {memory[0]:.0f} -> {memory[1]:.0f} MB; "
            f"first forward pass after {wall[0]:.1f} -> {wall[1]:.1f} s "
            f"({cpu[0]:.1f} -> {cpu[1]:.1f} s of CPU); largest difference {worst:.2g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
