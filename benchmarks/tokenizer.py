"""Training and encoding speed of BPETokenizer against Hugging Face `tokenizers`, one thread each.

    python benchmarks/tokenizer.py peps.jsonl.gz --vocab-size 30000 --rounds 3

Merges and ids are compared before any clock counts. Prints JSON lines: CPU seconds (medians, both
orders) and ratios (ours / theirs; above 1 we are slower at training, faster at encoding).
"""

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.alphabet import SPLITS


def read_texts(path: Path) -> list[str]:
    data = path.read_bytes()
    content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if ".jsonl" not in path.suffixes:
        return [content]
    return [json.loads(line)["text"] for line in content.splitlines()]


def train_ours(texts: list[str], vocab_size: int) -> BPETokenizer:
    tokenizer = BPETokenizer(vocab_size=vocab_size)
    tokenizer.train(texts)
    return tokenizer


def train_theirs(texts: list[str], vocab_size: int, split: str = "llama-bpe") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split].pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 4,
        min_frequency=0,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def in_turn(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each; the order turns round after every round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name in list(works)[:: 1 if index % 2 == 0 else -1]:
            seconds[name].append(cpu_seconds(works[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help=".jsonl, .jsonl.gz (key 'text') or .txt")
    parser.add_argument(
        "--vocab-size", type=int, default=30_000, help="ids in all, four special tokens included"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    texts = read_texts(arguments.text)
    size = sum(len(text.encode()) for text in texts)

    ours, theirs = (
        train_ours(texts, arguments.vocab_size),
        train_theirs(texts, arguments.vocab_size),
    )
    merges = [tuple(merge) for merge in json.loads(theirs.to_str())["model"]["merges"]]
    assert ours.merges == merges, "merges differ"
    ids, offsets = ours.encode_batch(texts)
    encoded = theirs.encode_batch_fast(texts, add_special_tokens=False)
    for index, encoding in enumerate(encoded):
        assert ids[offsets[index] : offsets[index + 1]].tolist() == encoding.ids, (
            f"ids of text {index} differ"
        )
    del encoded
    facts = {
        "text": arguments.text.name,
        "bytes": size,
        "merges": len(merges),
        "bytes_per_token": size / len(ids),
    }
    print(json.dumps({"check": "merges and ids equal", **facts}), flush=True)

    trained = in_turn(
        {
            "ours": lambda: train_ours(texts, arguments.vocab_size),
            "hf": lambda: train_theirs(texts, arguments.vocab_size),
        },
        arguments.rounds,
    )
    print(
        json.dumps(
            {"measure": "train_cpu_seconds", **trained, "ratio": trained["ours"] / trained["hf"]}
        ),
        flush=True,
    )

    def cold() -> None:
        ours._table.clear()
        ours.encode_batch(texts)

    encoders: dict[str, Callable[[], Any]] = {
        "ours_cold": cold,
        "ours_warm": lambda: ours.encode_batch(texts),
        "ours_lists": lambda: [ours.encode(text) for text in texts],
        "hf": lambda: theirs.encode_batch_fast(texts, add_special_tokens=False),
    }
    speeds = {
        name: size / 1e6 / value for name, value in in_turn(encoders, arguments.rounds).items()
    }
    ratios = {f"ratio_{name}": speeds[name] / speeds["hf"] for name in encoders if name != "hf"}
    print(json.dumps({"measure": "encode_mb_per_cpu_second", **speeds, **ratios}), flush=True)


if __name__ == "__main__":
    main()
