"""Training and encoding speed of BPETokenizer against other BPE libraries, one thread each.

    python benchmarks/bpe.py peps.jsonl.gz --vocab-size 30000 --peers-python VENV/bin/python

The other libraries (`pip install tokenizers tiktoken rustbpe gigatoken fastokens numpy`) run in a
process with a Python of their own; without one, only `tokenizers` is compared. Merges and ids are
compared before any clock counts. All run in turn, in both orders. Prints a Markdown table of
medians: CPU seconds, or MB of text a CPU second. rustbpe breaks ties otherwise and gigatoken trains
with GPT-2's pattern, so their merges are not compared.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from xinslm.machine import OtherLoad
from xinslm.native import library_path, reason
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.alphabet import SPLITS

Works = dict[str, Callable[[], float]]


def read_texts(path: Path) -> list[str]:
    data = path.read_bytes()
    content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if ".jsonl" not in path.suffixes:
        return [content]
    return [json.loads(line)["text"] for line in content.splitlines()]


class Peers:
    """The process of the other libraries."""

    def __init__(self, python: str, setup: dict[str, Any]):
        script = Path(__file__).parent / "peers" / "bpe_encoders.py"
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._send(setup)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        self._send(request)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the other libraries' process ended at {request}")
        return json.loads(line)


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def in_turn(works: Works, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each, round by round; the order turns round after every round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name in list(works)[:: 1 if index % 2 == 0 else -1]:
            seconds[name].append(works[name]())
    return seconds


def tokenizer_of(folder: Path, native: bool) -> BPETokenizer:
    """Load the trained tokenizer, ready to encode, with an empty table of pieces."""
    os.environ["XINSLM_NATIVE"] = "auto" if native else "off"
    tokenizer = BPETokenizer.load(folder)
    tokenizer.num_threads = 1
    tokenizer.encode("a")
    assert (tokenizer._native is not None) == native, reason()
    return tokenizer


def train(texts: list[str], vocab_size: int, native: bool) -> BPETokenizer:
    os.environ["XINSLM_NATIVE"] = "auto" if native else "off"
    tokenizer = BPETokenizer(vocab_size=vocab_size)
    tokenizer.num_threads = 1
    tokenizer.train(texts)
    return tokenizer


def check(peers: Peers, names: dict, ours: BPETokenizer, folder: Path, texts: list[str]) -> None:
    """Compare merges with `tokenizers`, and ids with everybody and with the Python twin."""
    peers.ask(train="tokenizers")
    assert ours.merges == [tuple(pair) for pair in peers.ask(merges=True)], "merges differ"
    expected, _ = tokenizer_of(folder, True).encode_batch(texts)
    twin, _ = tokenizer_of(folder, False).encode_batch(texts)
    assert np.array_equal(twin, expected), "ids of the Python twin differ"
    for name in names["encode"]:
        path = folder / "ids.npy"
        peers.ask(ids=name, path=str(path))
        found = np.load(path)
        same = np.array_equal(found, expected)
        print(f"ids of {name}: {'equal' if same else 'DIFFERENT'} ({len(found):,})", flush=True)


def works_of(
    peers: Peers, names: dict, folder: Path, texts: list[str], vocab_size: int
) -> tuple[Works, Works, Works]:
    """What is timed: training, cold encoding, warm encoding."""

    def cold(native: bool) -> float:
        fresh = tokenizer_of(folder, native)
        return cpu_seconds(lambda: fresh.encode_batch(texts))

    warm = {native: tokenizer_of(folder, native) for native in (True, False)}
    training: Works = {
        "xinslm": lambda: cpu_seconds(lambda: train(texts, vocab_size, True)),
        "xinslm in Python": lambda: cpu_seconds(lambda: train(texts, vocab_size, False)),
    }
    first: Works = {"xinslm": lambda: cold(True), "xinslm in Python": lambda: cold(False)}
    again: Works = {
        "xinslm": lambda: cpu_seconds(lambda: warm[True].encode_batch(texts)),
        "xinslm, lists": lambda: cpu_seconds(lambda: [warm[True].encode(t) for t in texts]),
        "xinslm in Python": lambda: cpu_seconds(lambda: warm[False].encode_batch(texts)),
    }
    for name in names["train"]:
        training[name] = lambda name=name: peers.ask(train=name)
    for name in names["encode"]:
        first[name] = lambda name=name: peers.ask(encode=name, fresh=True)
        again[name] = lambda name=name: peers.ask(encode=name)
    return training, first, again


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help=".jsonl, .jsonl.gz (key 'text') or .txt")
    parser.add_argument(
        "--vocab-size", type=int, default=30_000, help="ids in all, four special tokens included"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peers-python", default=sys.executable, help="Python of their environment"
    )
    args = parser.parse_args()
    texts = read_texts(args.text)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    if library_path() is None:
        sys.exit(f"there is no native library: {reason()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = train(texts, args.vocab_size, True)
        ours.save(folder)
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        setup = {"folder": name, "texts": str(folder / "texts.json")}
        setup |= {"pattern": SPLITS["llama-bpe"].pattern, "num_tokens": args.vocab_size - 4}
        peers = Peers(args.peers_python, setup)
        names = peers.ask(names=[])
        versions = ", ".join(f"{n} {v}" for n, v in (names["encode"] | names["train"]).items())
        print(f"{describe(('numpy', 'regex'))}; {versions}")
        print(f"{args.text.name}, {megabytes:.1f} MB, {len(ours.merges):,} merges", flush=True)
        check(peers, names, ours, folder, texts)
        load = OtherLoad()
        training, first, again = (
            in_turn(works, args.rounds)
            for works in works_of(peers, names, folder, texts, args.vocab_size)
        )
        print(f"other processes took {load.share() or 0:.0%} of the machine's CPU time\n")
    print("| | train, s | encode cold, MB/s | warm, MB/s | warm: ours / theirs, least to largest |")
    print("|---|---:|---:|---:|---|")
    for name in dict.fromkeys([*again, *training]):
        train_cell = f"{statistics.median(training[name]):.2f}" if name in training else ""
        cells = [
            f"{megabytes / statistics.median(times[name]):.1f}" if name in times else ""
            for times in (first, again)
        ]
        ratios = [b / a for a, b in zip(again["xinslm"], again.get(name, []), strict=False)]
        spread = (
            f"{statistics.median(ratios):.2f}, {min(ratios):.2f}-{max(ratios):.2f}"
            if ratios
            else ""
        )
        print(f"| {name} | {train_cell} | {' | '.join(cells)} | {spread} |")


if __name__ == "__main__":
    main()
