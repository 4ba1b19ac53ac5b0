"""Distillation on a real language model: the claims of the README on SmolLM2-135M-Instruct.

    python benchmarks/real_model.py MODEL --data ../shared/data --work /tmp/real --rows main mix
    python benchmarks/real_model.py MODEL --data ../shared/data --work /tmp/real --table

MODEL is the GGUF file or a model folder. Students are cut out of it, trained on alpaca chats, and
measured in bits per byte on held-out chats and on Wikipedia text that no arm has seen. They have 16
layers of 768 neurons with the first 16,384 merges of the vocabulary (45M parameters); `full`: 12
layers of 512 neurons with all of it (50M); `large`: 24 whole layers with all of it (113M). Every
arm is a run of the installed package in a process of its own; arms that are in WORK/results.jsonl
are not repeated, and a run that was stopped continues.
"""

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import describe
from quality_of_cache import TopK

import xinslm
from xinslm.cache import entries
from xinslm.cli.main import main as cli_main
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.distill import supervision
from xinslm.distill.target_sources import LiveTargets
from xinslm.evaluate.config import EvaluateConfig
from xinslm.model.files import open_model
from xinslm.teachers.huggingface import HuggingFaceTeacher

BATCH, LENGTH, RATE = 4, 512, 3e-4
DOMAINS = ("chat", "wiki")
SHAPES = {
    "small": ("--num-layers", 16, "--intermediate-size", 768),
    "large": ("--num-layers", 24),
    "full": ("--num-layers", 12, "--intermediate-size", 512),
    "equal": ("--num-layers", 9, "--intermediate-size", 512),
}
"""Sizes of the students; `equal` has all of the vocabulary and the parameters of `small`."""
RANDOM = (
    "--hidden-size",
    576,
    "--num-layers",
    16,
    "--num-heads",
    9,
    "--num-kv-heads",
    3,
    "--intermediate-size",
    768,
)
NESTED = 16384
"""Vocabulary of `small`."""


@dataclass(frozen=True)
class Arm:
    """A student's training: a command with its options, from a start and on a dataset.

    A word in braces stands for the folder that `Bench` makes under that name.
    """

    name: str
    words: tuple[str, ...] = ()
    data: str = "data"
    start: str = "start"
    longer: float = 1.0
    """Times as many steps as the other arms."""
    top: int = 0
    """Live distributions of this many renormalised tokens, as the peers cache them."""
    quantized: bool = False
    """Quantize the student to 4 bits, and measure that too."""


def weights(alpha: float) -> tuple[str, ...]:
    """Options for weights alpha and 1 - alpha."""
    return "--loss.alpha", str(alpha), "--loss.beta", str(round(1 - alpha, 3))


def kd(name: str, alpha: float, *more: str, cache: str = "{cache}", **fields: object) -> Arm:
    """An arm that learns from a cache."""
    words = ("distill", "--cache", cache, *weights(alpha), *more)
    return Arm(name, words, **fields)  # type: ignore[arg-type]


def live(name: str, top: int = 0) -> Arm:
    """An arm that learns from whole distributions of the teacher, and from nothing else."""
    words = ("distill", "--teacher", "{teacher}", *weights(0))
    return Arm(name, words, data="data_full", start="start_full", top=top)


FULL = {"data": "data_full", "start": "start_full"}
LARGE = {"data": "data_full", "start": "start_large"}
EQUAL = {"data": "data_full", "start": "start_equal"}
WRITTEN = {"data": "answers/data"}
CE = Arm("cross-entropy", ("pretrain",))
ROWS: dict[str, list[Arm]] = {
    "main": [CE, kd("KD", 0.5, quantized=True)],
    "mix": [kd("KD, alpha .1", 0.1), kd("KD, alpha .7", 0.7), kd("KD, alpha 0", 0)],
    "time": [
        Arm("cross-entropy, longer", ("pretrain",), longer=2.4),
        kd("KD, longer", 0.5, longer=2.4),
    ],
    "start": [Arm("cross-entropy, random start", ("pretrain",), start="")],
    "written": [
        kd("KD on the teacher's text", 0.5, cache="{answers}/cache", **WRITTEN),
        Arm("cross-entropy on the teacher's text", ("pretrain",), **WRITTEN),
    ],
    "hidden": [
        kd("KD, hidden states", 0.5, "--hidden.weight", "1"),
        kd("KD, hidden states, InfoNCE", 0.5, "--hidden.weight", "1", "--contrast.weight", "0.05"),
    ],
    "adapted": [kd("KD from a LoRA-adapted teacher", 0.5, cache="{cache_adapted}")],
    "gemma": [
        kd("KD from Gemma 3 270M", 0.5, cache="{cache_gemma}"),
        kd("KD from both", 0.5, "--more-caches", "{cache_gemma}"),
    ],
    "vocabulary": [
        Arm("cross-entropy, 49k", ("pretrain",), **EQUAL),
        kd("KD, 49k", 0.5, cache="{cache_full}", **EQUAL),
        kd("KD, 49k, as long as 16k", 0.5, cache="{cache_full}", longer=1.2, **EQUAL),
    ],
    "onpolicy": [
        kd("full: KD", 0.5, cache="{cache_full}", **FULL),
        Arm("full: on-policy, a quarter of each step from the cache", ("onpolicy",), **FULL),
    ],
    "cache": [
        Arm("full: cross-entropy", ("pretrain",), **FULL),
        live("full: KD, alpha 0, live"),
        kd("full: KD, alpha 0, 39 bytes", 0, cache="{cache_full}", **FULL),
        kd("full: KD, alpha 0, 30 bytes", 0, cache="{cache30}", **FULL),
        live("full: top 12 renormalised", top=12),
        live("full: top 128 renormalised", top=128),
    ],
    "ten": [kd("full: KD, alpha 0, ten samples everywhere", 0, cache="{cacheten}", **FULL)],
    "large": [
        Arm("large: cross-entropy", ("pretrain",), **LARGE),
        kd("large: KD", 0.5, cache="{cache_full}", quantized=True, **LARGE),
    ],
    "wall": [
        Arm("large: cross-entropy, the cache's time too", ("pretrain",), longer=1.62, **LARGE)
    ],
    "live": [Arm("large: KD, live", ("distill", "--teacher", "{teacher}"), **LARGE)],
    "long": [
        Arm("large: cross-entropy, longer", ("pretrain",), longer=2.5, **LARGE),
        kd("large: KD, longer", 0.5, cache="{cache_full}", longer=2.5, **LARGE),
    ],
}


class Bench:
    """Folders of the inputs, made when first asked for, and the runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.model, self.source, self.work = args, args.model, args.data, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = self.work / "results.jsonl"

    def tool(self, *command: object) -> float:
        """Run a command of the tool, return its seconds; its output goes to WORK/log.txt."""
        began = time.perf_counter()
        words = [sys.executable, "-m", "xinslm", *map(str, command)]
        with open(self.work / "log.txt", "a") as log:
            subprocess.run(words, check=True, stdout=log, stderr=log)
        return time.perf_counter() - began

    def folder(self, name: str) -> Path:
        """An input's folder, complete; how long it took is a line in results.jsonl."""
        name, _, rest = name.partition("/")
        path = self.work / name
        if not path.exists():
            began = time.perf_counter()
            maker, _, size = name.partition("_")
            make = getattr(self, f"make_{maker}")
            make(path, *([size] if size else []))
            seconds = time.perf_counter() - began
            self.store({"key": f"make {name}", "arm": f"make {name}", "seconds": seconds})
        return path / rest if rest else path

    def make_teacher(self, path: Path) -> None:
        """The model as a folder."""
        self.tool("import", self.model, "-o", path)

    def make_tokenizer(self, path: Path) -> None:
        """The first merges of the teacher's."""
        self.tool(
            *("tokenizer", "train", "--prefix-of", self.folder("teacher")),
            *("--vocab-size", NESTED, "-o", path),
        )

    def make_data(self, path: Path, size: str = "") -> None:
        """Alpaca chats, in the nested tokens or in the teacher's."""
        chats = self.work / "chats.jsonl"
        rows = json.loads(
            gzip.decompress((self.source / "instruct/alpaca_en_demo.json.gz").read_bytes())
        )
        chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._prepare(chats, path, size, "--validation-fraction", 0.06)

    def make_wiki(self, path: Path, size: str = "") -> None:
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
        self._prepare(file, path, size, "--validation-path", file, "--keep-duplicates")

    def _prepare(self, text: Path, path: Path, size: str, *options: object) -> None:
        tokenizer = self.folder("teacher" if size else "tokenizer")
        self.tool(
            "prepare", "--data-path", text, "--tokenizer-path", tokenizer, "-o", path, *options
        )

    def make_start(self, path: Path, size: str = "") -> None:
        """The pruned student."""
        self.tool(
            *("prune", self.folder("teacher"), *SHAPES[size or "small"], "-o", path),
            *("--data-path", self.folder("data_full" if size else "data")),
            *("--layers", "influence", "--num-calibration-samples", 24),
            *("--num-search-samples", 4, "--max-eval-samples", 6),
        )

    def make_cache(self, path: Path, kind: str = "", *options: object) -> None:
        """A teacher's targets, 39 bytes a position, and the hidden states of the first cache."""
        teacher, data = self.folder("teacher"), self.folder("data_full" if kind else "data")
        if kind == "gemma":
            teacher, data = self.args.gemma, self.folder("data")
        if kind == "adapted":
            options, data = ("--adapter", self.folder("adapter")), self.folder("data")
        if not kind:
            options = ("--hidden-state-depths", 0.5, 1.0)
        self.tool(
            *("cache", teacher, "--data-path", data, "--max-seq-length", LENGTH, "-o", path),
            *options,
        )

    def make_cache30(self, path: Path) -> None:
        """The teacher's targets, 30 bytes a position."""
        self.make_cache(path, "full", "--tail-sample-mass", 0.04)

    def make_cacheten(self, path: Path) -> None:
        """The teacher's targets with the same number of tail samples at each position."""
        words = ("cache", self.folder("teacher"), "--data-path", self.folder("data_full"))
        words += ("--max-seq-length", LENGTH, "-o", path)
        program = [sys.executable, __file__, "--same-samples", "10", *map(str, words)]
        with open(self.work / "log.txt", "a") as log:
            subprocess.run(program, check=True, stdout=log, stderr=log)

    def make_adapter(self, path: Path) -> None:
        """The teacher, fitted to the chats."""
        self.tool(
            *("adapt", self.folder("teacher"), "--data-path", self.folder("data_full")),
            *("-o", path, "--max-seq-length", LENGTH, "--max-steps", 60),
        )

    def make_answers(self, path: Path) -> None:
        """The teacher's own answers to the chats' prompts."""
        self.folder("data")
        self.tool(
            *("synthesize", self.folder("teacher"), "--prompts", self.work / "chats.jsonl"),
            *("--tokenizer-path", self.folder("tokenizer"), "--temperature", 0.7, "--top-p", 0.95),
            *("--max-new-tokens", 160, "--max-seq-length", LENGTH, "--seed", 0, "-o", path),
        )

    def done(self) -> dict[str, dict]:
        """Stored results by key."""
        if not self.results.exists():
            return {}
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        return {line["key"]: line for line in lines}

    def run(self, arm: Arm, seed: int, steps: int) -> None:
        """Train and measure an arm, unless that is stored."""
        steps = round(steps * arm.longer)
        key = f"{arm.name}, {steps} steps, seed {seed}"
        if key in self.done():
            return
        folder = self.work / "runs" / key.replace(" ", "_").replace(",", "").replace(":", "")
        if arm.words[0] == "onpolicy":
            return self.store(self.on_policy(arm, folder, steps, seed) | {"key": key})
        words = [
            str(self.folder(word[1:].partition("}")[0])) + word.partition("}")[2]
            if word.startswith("{")
            else word
            for word in arm.words
        ]
        begin = ("--init-from", self.folder(arm.start)) if arm.start else RANDOM
        words += map(str, ("--data-path", self.folder(arm.data), "-o", folder, *begin))
        words += map(str, ("--batch-size", BATCH, "--max-seq-length", LENGTH, "--max-steps", steps))
        words += map(str, ("--learning-rate", RATE, "--seed", seed, "--warmup-ratio", 0.2))
        words += map(str, ("--eval-steps", 10_000))
        words += map(str, ("--max-eval-samples", 8, "--save-steps", 10_000))
        if arm.top:
            began = time.perf_counter()
            program = [sys.executable, __file__, "--renormalised", str(arm.top), *words]
            with open(self.work / "log.txt", "a") as log:
                subprocess.run(program, check=True, stdout=log, stderr=log)
            seconds = time.perf_counter() - began
        else:
            seconds = self.tool(*words)
        full = arm.data.startswith("data_full")
        row = {"key": key, "arm": arm.name, "seed": seed, "steps": steps, "seconds": seconds}
        self.store({**row, **self.measure(folder, full)})
        if arm.quantized:
            small = folder.with_name(folder.name + "_4bit")
            data = self.folder(arm.data)
            row |= {"key": key + ", 4 bits", "arm": arm.name + ", 4 bits"}
            row["seconds"] = self.tool(
                "quantize", folder, "--data-path", data, "-o", small, "--max-seq-length", LENGTH
            )
            self.store({**row, **self.measure(small, full)})
            shutil.rmtree(small)
        shutil.rmtree(folder, ignore_errors=True)

    def on_policy(self, arm: Arm, folder: Path, steps: int, seed: int) -> dict:
        """Train on the student's own answers, about as many tokens as the other arms."""
        rounds, share, answer, prompt = 4, 0.25, 128, 40
        tokens = steps * BATCH * LENGTH * (1 - share)
        seconds = self.tool(
            *("onpolicy", "--student", self.folder(arm.start), "--teacher", self.folder("teacher")),
            *("--prompts", self.folder(arm.data), "-o", folder, "--rounds", rounds),
            *("--mix-data", self.folder(arm.data), "--mix-cache", self.folder("cache_full")),
            *("--mix-share", share, "--max-new-tokens", answer, "--seed", seed),
            *("--completions", round(tokens / rounds / (answer + prompt))),
            *("--batch-size", BATCH, "--max-seq-length", LENGTH, "--learning-rate", RATE),
            *("--warmup-ratio", 0.2, "--max-eval-samples", 8, "--save-steps", 10_000),
        )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        done = max(line.get("step", 0) for line in lines)
        row = {"arm": arm.name, "seed": seed, "steps": done, "seconds": seconds}
        return row | self.measure(folder, arm.data.startswith("data_full"))

    def measure(self, model: Path, full: bool) -> dict[str, float]:
        """Bits per byte in both domains; with the teacher's vocabulary also KL(teacher || model) in
        nats per token of the held-out answers.
        """
        found = {}
        for domain, name in (("chat", "data"), ("wiki", "wiki")):
            data = self.folder(name + ("_full" if full else ""))
            config = EvaluateConfig(model=model, data_path=(str(data),), max_seq_length=LENGTH)
            found[domain] = xinslm.run(config).bits_per_byte
        return found | ({"kl": self.divergence(model)} if full else {})

    @torch.no_grad()
    def divergence(self, model: Path) -> float:
        """Mean of KL(teacher || model) over the tokens of the held-out answers."""
        rows = PackedDataset(open_dataset(self.folder("data_full")).split("validation"), LENGTH)
        teacher, student = (
            HuggingFaceTeacher(open_model(path)) for path in (self.folder("teacher"), model)
        )
        total, count = 0.0, 0
        for number in range(len(rows)):
            batch = rows.batch(np.array([number]))
            chosen = np.flatnonzero(batch.labels.ravel() >= 0)
            p, q = (
                LiveTargets(side).targets(batch, chosen, torch.device("cpu")).logits(slice(None))
                for side in (teacher, student)
            )
            p, q = p.log_softmax(1), q.log_softmax(1)
            total += (p.exp() * (p - q)).sum().item()
            count += len(chosen)
        return total / count

    def store(self, row: dict) -> None:
        """Append a result."""
        with open(self.results, "a") as file:
            file.write(json.dumps({**row, "machine": describe()}) + "\n")

    def table(self) -> str:
        """All results, a line an arm and number of steps: mean and range over the seeds."""
        groups: dict[tuple[str, int], list[dict]] = {}
        for row in self.done().values():
            groups.setdefault((row["arm"], row.get("steps", 0)), []).append(row)
        lines = [
            "| arm | steps | seeds | chat | wiki | KL | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for (arm, steps), rows in groups.items():
            cells = [
                spread([row[key] for row in rows if key in row]) for key in ("chat", "wiki", "kl")
            ]
            seconds = [row["seconds"] for row in rows if "seconds" in row]
            cells.append(f"{statistics.median(seconds):.0f}" if seconds else "")
            lines.append(f"| {arm} | {steps} | {len(rows)} | {' | '.join(cells)} |")
        return "\n".join([describe(), "", *lines])


def spread(values: list[float]) -> str:
    """Mean and range."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f}-{max(values):.4f})"


def renormalised(count: int, words: list[str]) -> None:
    """`xinslm distill` with the peers' targets: a live teacher's most likely tokens alone."""
    supervision.LiveTargets = lambda teacher, depths: TopK(teacher, count)  # type: ignore[misc,assignment]
    sys.exit(cli_main(words))


def same_samples(count: int, words: list[str]) -> None:
    """`xinslm cache` with `count` tail samples wherever the tail has mass."""
    entries.num_samples = lambda mass, _: count * (mass > 0).long()  # type: ignore[assignment]
    sys.exit(cli_main(words))


def main() -> None:
    """Run the arms of the rows that are asked for."""
    for option, patched in (("--renormalised", renormalised), ("--same-samples", same_samples)):
        if sys.argv[1:2] == [option]:
            patched(int(sys.argv[2]), sys.argv[3:])
            return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gemma", help="Gemma 3 270M as a GGUF file, for the row gemma")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=49, help="of 2,048 tokens")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    bench = Bench(args)
    if args.table:
        print(bench.table())
        return
    for seed in args.seeds:
        for row in args.rows:
            for arm in ROWS[row]:
                name = arm.start
                if name and f"{name}-0" not in bench.done():
                    full = name != "start"
                    found = bench.measure(bench.folder(name), full)
                    bench.store({"key": f"{name}-0", "arm": f"pruned, {name}", "seed": 0, **found})
                bench.run(arm, seed, args.steps)
                print(bench.table(), flush=True)


if __name__ == "__main__":
    main()
