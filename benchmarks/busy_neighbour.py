"""What one busy neighbour process costs a training run, for several policies of its threads.

    python benchmarks/busy_neighbour.py --shape demo --rounds 12
    python benchmarks/busy_neighbour.py --shape 1m --policies torch,xinslm,passive,bound,one-thread

Each policy is a process that trains a small model. Blocks of a few seconds run in turn: every
policy alone, every policy with one neighbour that spins (it is stopped and continued by signal).
Blocks in which other processes used the processor are repeated, and the script gives no verdict if
it cannot get enough undisturbed ones. Medians over rounds; ratios within a round.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
from machine import describe

from xinslm.cli.threads import FreeCores
from xinslm.progress import Progress

DEMO = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
ONE_M = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5}
TINY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
SHAPES = {"demo": (DEMO, 2048, 8, 256), "1m": (ONE_M, 4096, 8, 256), "tiny": (TINY, 512, 4, 64)}
"""Model, vocabulary, rows of a step, tokens of a row; demo is the demo's teacher, tiny like tests."""
LIMIT, IDLE_LIMIT = 1.6, 1.05
Results = dict[str, list[tuple[float, float]]]
"""Seconds a step of each policy, (alone, with the neighbour), round by round."""
OTHERS = 0.1
"""Cores that other processes may use during a block that counts."""


NEIGHBOUR = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def policies(names: list[str]) -> dict[str, dict[str, str]]:
    """Environment of each policy's process."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    chosen = {}
    for name in names:
        chosen[name] = dict(plain)
        if name == "passive":
            chosen[name]["OMP_WAIT_POLICY"] = "passive"
        elif name.startswith("spin-"):
            chosen[name]["GOMP_SPINCOUNT"] = name.removeprefix("spin-")
        elif name == "one-thread":
            chosen[name]["OMP_NUM_THREADS"] = "1"
        elif name == "bound":
            chosen[name]["OMP_PROC_BIND"] = "true"
        elif name not in ("torch", "xinslm"):
            sys.exit(f"no policy {name}: torch, xinslm, passive, bound, spin-N, one-thread")
    return chosen


def train(shape: str, policy: str) -> None:
    """The process of one policy: a block of training steps for each line of input."""
    import torch

    from xinslm.losses.config import LossConfig
    from xinslm.losses.fused import fused_loss
    from xinslm.model.config import ModelConfig
    from xinslm.model.transformer import Transformer

    model_shape, vocab, rows, length = SHAPES[shape]
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "max_position_embeddings": length,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "tie_word_embeddings": True,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **model_shape,
        }
    )
    torch.manual_seed(0)
    model = Transformer(config).train()
    model.initialise()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    tokens = torch.randint(vocab, (rows, length + 1))

    def step() -> None:
        hidden = model.hidden(tokens[:, :-1]).reshape(rows * length, -1)
        labels = tokens[:, 1:].reshape(-1)
        loss, _ = fused_loss(hidden, model.head_weight, labels, None, LossConfig(1.0, 0.0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()

    def block(seconds: float) -> float:
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            step()
            steps += 1
            if free_cores is not None:
                free_cores(Progress("train"))
        return (time.perf_counter() - began) / steps

    print("ready", flush=True)
    free_cores = FreeCores(lambda progress: None, {}) if policy == "xinslm" else None
    for line in sys.stdin:
        settle, seconds = map(float, line.split())
        block(settle)
        print(block(seconds), flush=True)


class Bench:
    """The processes of all policies and the neighbour."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack):
        self.anyway, self.disturbed = args.anyway, list[float]()
        self.settle, self.seconds = args.settle, args.seconds
        self.deadline = time.monotonic() + 60 * args.minutes
        self.neighbour = stack.enter_context(subprocess.Popen([sys.executable, "-c", NEIGHBOUR]))
        stack.callback(self.neighbour.kill)
        os.kill(self.neighbour.pid, signal.SIGSTOP)
        self.sides: dict[str, subprocess.Popen[str]] = {}
        for name, env in policies(args.policies.split(",")).items():
            command = [sys.executable, __file__, "--shape", args.shape, "--child", name]
            side = stack.enter_context(
                subprocess.Popen(
                    command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(side.kill)
            if side.stdout.readline() != "ready\n":
                sys.exit(f"{name}: the training process did not start")
            self.sides[name] = side

    def block(self, name: str, busy: bool) -> float | None:
        """Seconds a step, or None if other processes kept the machine busy for too long."""
        while time.monotonic() < self.deadline:
            if not (self.anyway or self._quiet()):
                continue
            os.kill(self.neighbour.pid, signal.SIGCONT if busy else signal.SIGSTOP)
            time.sleep(0.1)
            began, others = time.perf_counter(), self._others()
            print(self.settle, self.seconds, file=self.sides[name].stdin, flush=True)
            result = float(self.sides[name].stdout.readline())
            elapsed = time.perf_counter() - began
            os.kill(self.neighbour.pid, signal.SIGSTOP)
            self.disturbed.append((self._others() - others) / elapsed)
            if self.anyway or self.disturbed[-1] < OTHERS:
                return result
        return None

    def _quiet(self) -> bool:
        """Whether other processes left the processor alone for half a second."""
        others = self._others()
        time.sleep(0.5)
        return self._others() - others < 0.5 * OTHERS

    def _others(self) -> float:
        """Processor seconds that neither the neighbour nor our processes used, up to now."""
        total = psutil.cpu_times()
        used = sum(total) - total.idle - getattr(total, "iowait", 0.0)
        ours = [self.neighbour.pid, os.getpid(), *(side.pid for side in self.sides.values())]
        return used - sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in ours)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--policies", default="torch,xinslm")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--settle", type=float, default=2.5, help="seconds of a block not counted")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop waiting for idle cores")
    parser.add_argument(
        "--anyway", action="store_true", help="count disturbed blocks too, and give no verdict"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train(args.shape, args.child)
    print(f"{describe(('torch',))}\nshape {args.shape}, blocks of {args.seconds:g} s", flush=True)
    with ExitStack() as stack:
        bench = Bench(args, stack)
        results = measure(bench, args.rounds)
    report(results, args.rounds)
    if max(bench.disturbed) >= OTHERS and args.anyway:
        print(
            f"\nno verdict: other processes used {statistics.median(bench.disturbed):.2f} cores "
            f"(median over blocks, at most {max(bench.disturbed):.2f})"
        )
    else:
        judge(results)


def measure(bench: Bench, rounds: int) -> Results:
    """(alone, with the neighbour) of every policy, for the rounds in which all blocks count."""
    results: Results = {name: [] for name in bench.sides}
    for number in range(rounds):
        names = list(results) if number % 2 == 0 else list(reversed(results))
        blocks = {(name, busy): bench.block(name, busy) for name in names for busy in (False, True)}
        if None in blocks.values():
            continue
        for name in names:
            results[name].append((blocks[name, False], blocks[name, True]))
            print(
                json.dumps({"round": number, "policy": name, "alone_and_busy": results[name][-1]}),
                flush=True,
            )
    return results


def report(results: Results, rounds: int) -> None:
    """Print the table, then the verdict on the policy `xinslm`."""
    first = next(iter(results))
    num = len(results[first])
    if num < max(3, rounds // 2):
        sys.exit(f"no verdict: other processes disturbed {rounds - num} of {rounds} rounds")
    print(
        "\n| policy | ms a step, alone | with a neighbour | ratio (least-largest) | alone, against the first |"
    )
    print("|---|---|---|---|---|")
    for name, pairs in results.items():
        ratios = sorted(busy / alone for alone, busy in pairs)
        alone, busy = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        print(
            f"| {name} | {alone:.1f} | {busy:.1f} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f}) | {against(results, name, first):.2f} |"
        )


def against(results: Results, name: str, other: str) -> float:
    """Median over rounds of a step's time alone, divided by that of another policy."""
    pairs = zip(results[name], results[other], strict=True)
    return statistics.median(mine / theirs for (mine, _), (theirs, _) in pairs)


def judge(results: Results) -> None:
    """Print whether the policy `xinslm` keeps both limits; exit with 1 if it does not."""
    if not {"torch", "xinslm"} <= set(results):
        return
    cost = statistics.median(busy / alone for alone, busy in results["xinslm"])
    idle = against(results, "xinslm", "torch")
    passed = cost <= LIMIT and idle <= IDLE_LIMIT
    print(
        f"\nwith a neighbour {cost:.2f} (limit {LIMIT}), alone {idle:.2f} of torch's time (limit "
        f"{IDLE_LIMIT}): {'pass' if passed else 'FAIL'}"
    )
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
