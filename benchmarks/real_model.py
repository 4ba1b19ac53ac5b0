"""Distillation on a real language model: each claim of the README on SmolLM2-135M-Instruct.

    python benchmarks/real_model.py MODEL --data ../shared/data --work /tmp/real --rows main
    python benchmarks/real_model.py MODEL --data ../shared/data --work /tmp/real --table

MODEL is the GGUF file or a model folder. Students are cut out of it, trained on alpaca chats, and
measured in bits per byte on held-out chats and on Wikipedia text that no arm has seen. Every arm is
a `distill` or `pretrain` run of the installed package in a process of its own; arms that are in
WORK/results.jsonl are not repeated, and a run that was stopped continues. `--table` prints what is
there. An arm at equal wall time is the arm trained for as many more steps as its training and the
cache's time allow, from `--cost`, measured on an idle machine by `benchmarks/speed.py`.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from machine import describe

import xinslm
from xinslm.evaluate.config import EvaluateConfig

BATCH, LENGTH, RATE = 4, 512, 3e-4
DOMAINS = ("chat", "wiki")


@dataclass(frozen=True)
class Arm:
    """A student's training: from a start, on a dataset, with these options of `distill`."""

    name: str
    options: tuple[str, ...] = ()
    data: str = "data"
    start: str = "start"
    command: str = "distill"

    def key(self, seed: int, steps: int) -> str:
        """Name of the run's folder and of its line in results.jsonl."""
        return f"{self.name}-{steps}-{seed}"


def weights(alpha: float, beta: float) -> tuple[str, ...]:
    """Options that set the weights of the loss."""
    return "--loss.alpha", str(alpha), "--loss.beta", str(beta)


CE = Arm("cross-entropy", command="pretrain")
KD = Arm("KD, cache", ("--cache", "cache", *weights(0.1, 0.9)))
ROWS: dict[str, list[Arm]] = {
    "main": [CE, KD, Arm("KD, live", ("--teacher", "teacher", *weights(0.1, 0.9)))],
    "mix": [
        CE,
        KD,
        Arm("alpha .5", ("--cache", "cache", *weights(0.5, 0.5))),
        Arm("alpha .7", ("--cache", "cache", *weights(0.7, 0.3))),
    ],
    "cache": [
        CE,
        Arm("KD, live", ("--teacher", "teacher", *weights(0.0, 1.0))),
        Arm("39 bytes", ("--cache", "cache", *weights(0.0, 1.0))),
        Arm("29 bytes", ("--cache", "cache29", *weights(0.0, 1.0))),
    ],
    "start": [CE, Arm("random start", start="random", command="pretrain")],
}


class Bench:
    """Folders of the inputs, made when first asked for, and the runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.source, self.work = args.model, args.data, args.work
        self.layers = args.layers
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = self.work / "results.jsonl"

    def tool(self, *command: object) -> None:
        """Run a command of the tool; its output goes to WORK/log.txt."""
        words = [sys.executable, "-m", "xinslm", *map(str, command)]
        with open(self.work / "log.txt", "a") as log:
            subprocess.run(words, check=True, stdout=log, stderr=log)

    def folder(self, name: str) -> Path:
        """An input's folder, complete."""
        path = self.work / name
        if not path.exists():
            getattr(self, f"make_{name}")(path)
        return path

    def make_teacher(self, path: Path) -> None:
        """The model as a folder."""
        if Path(self.model).is_dir():
            path.symlink_to(Path(self.model).resolve())
        else:
            self.tool("import", self.model, "-o", path)

    def make_data(self, path: Path) -> None:
        """Alpaca chats."""
        chats = self.work / "chats.jsonl"
        rows = json.loads(
            gzip.decompress((self.source / "instruct/alpaca_en_demo.json.gz").read_bytes())
        )
        chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._prepare(chats, path, "--validation-fraction", 0.06)

    def make_wiki(self, path: Path) -> None:
        """Wikipedia articles, the first 60,000 characters, in documents of about 2,000."""
        text = gzip.decompress(
            (self.source / "text/wikitext2_raw_train_5k.txt.gz").read_bytes()
        ).decode()
        documents, part = [], ""
        for line in text[:60_000].splitlines(keepends=True):
            part += line
            if len(part) > 2000:
                documents.append(part.strip())
                part = ""
        file = self.work / "wiki.jsonl"
        file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        self._prepare(file, path, "--validation-path", file, "--keep-duplicates")

    def _prepare(self, text: Path, path: Path, *options: object) -> None:
        tokenizer = self.folder("teacher")
        self.tool(
            "prepare", "--data-path", text, "--tokenizer-path", tokenizer, "-o", path, *options
        )

    def make_start(self, path: Path) -> None:
        """The pruned student."""
        self.tool(
            *("prune", self.folder("teacher"), "--data-path", self.folder("data")),
            *("--num-layers", self.layers, "--layers", "influence", "-o", path),
        )

    def make_cache(self, path: Path, *options: object) -> None:
        """The teacher's targets, 39 bytes a position."""
        self.tool(
            *("cache", self.folder("teacher"), "--data-path", self.folder("data")),
            *("--max-seq-length", LENGTH, "-o", path, *options),
        )

    def make_cache29(self, path: Path) -> None:
        """The teacher's targets, 29 bytes a position."""
        self.make_cache(path, "--top-k", 2, "--tail-samples", 8)

    def done(self) -> dict[str, dict]:
        """Stored results by key."""
        if not self.results.exists():
            return {}
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        return {line["key"]: line for line in lines}

    def run(self, arm: Arm, seed: int, steps: int) -> None:
        """Train and measure an arm, unless that is stored."""
        key = arm.key(seed, steps)
        if key in self.done():
            return
        folder = self.work / "runs" / key.replace(" ", "_").replace(",", "")
        begin = () if arm.start == "random" else ("--init-from", self.folder(arm.start))
        options = [
            self.folder(word) if word in ("cache", "cache29", "teacher") else word
            for word in arm.options
        ]
        began = time.time()
        self.tool(
            *(arm.command, "--data-path", self.folder(arm.data), "-o", folder, *begin),
            *("--batch-size", BATCH, "--max-seq-length", LENGTH, "--learning-rate", RATE),
            *("--max-steps", steps, "--seed", seed, "--eval-steps", max(1, steps // 5)),
            *("--max-eval-samples", 16, "--save-steps", 1000, *options),
        )
        seconds = time.time() - began
        self.store(
            {
                "key": key,
                "arm": arm.name,
                "seed": seed,
                "steps": steps,
                "seconds": seconds,
                **self.measure(folder),
            }
        )
        subprocess.run(["rm", "-rf", str(folder / "checkpoints" / "last")], check=False)

    def measure(self, model: Path) -> dict[str, float]:
        """Bits per byte in both domains."""
        found = {}
        for domain, data in zip(DOMAINS, ("data", "wiki"), strict=True):
            config = EvaluateConfig(
                model=model, data_path=(str(self.folder(data)),), max_seq_length=LENGTH
            )
            found[domain] = xinslm.run(config).bits_per_byte
        return found

    def store(self, row: dict) -> None:
        """Append a result."""
        with open(self.results, "a") as file:
            file.write(json.dumps({**row, "machine": describe()}) + "\n")

    def table(self) -> str:
        """All results, a line an arm and number of steps: mean and spread over the seeds."""
        groups: dict[tuple[str, int], list[dict]] = {}
        for row in self.done().values():
            groups.setdefault((row["arm"], row["steps"]), []).append(row)
        lines = ["| arm | steps | seeds | chat | wiki |", "|---|---|---|---|---|"]
        for (arm, steps), rows in groups.items():
            cells = []
            for domain in DOMAINS:
                values = [row[domain] for row in rows]
                cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f}-{max(values):.4f})")
            lines.append(f"| {arm} | {steps} | {len(rows)} | {' | '.join(cells)} |")
        return "\n".join([describe(), "", *lines])


def main() -> None:
    """Run the arms of the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--layers", type=int, default=24, help="blocks of the student, of 30")
    parser.add_argument("--steps", type=int, default=100, help="of 2,048 tokens")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    bench = Bench(args)
    if args.table:
        print(bench.table())
        return
    stored = bench.done()
    for name, folder in (("teacher", "teacher"), ("pruned", "start")):
        if f"{name}-0-0" not in stored:
            found = bench.measure(bench.folder(folder))
            bench.store({"key": f"{name}-0-0", "arm": name, "seed": 0, "steps": 0, **found})
    for seed in args.seeds:
        for row in args.rows:
            for arm in ROWS[row]:
                bench.run(arm, seed, args.steps)
                print(bench.table(), flush=True)


if __name__ == "__main__":
    main()
