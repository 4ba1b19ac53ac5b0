"""Other BPE libraries for `benchmarks/bpe.py`, which starts this file with their Python.

Reads one JSON request a line and answers with one line: {"names": []}, {"train": name},
{"encode": name, "fresh": bool}, {"ids": name, "path": file}. Libraries that are absent are left
out. Seconds are CPU time of the whole process, so threads count as work.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np

ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # gigatoken prints what it does


class Peers:
    """The libraries, with the tokenizer in `folder` and the texts."""

    def __init__(self, folder: Path, texts: list[str], pattern: str, num_tokens: int):
        self.file, self.texts = str(folder / "tokenizer.json"), texts
        self.pattern, self.num_tokens = pattern, num_tokens
        self.encoders: dict[str, Callable[[], tuple[Callable, Callable]]] = {
            "tokenizers": self.hugging_face,
            "tiktoken": self.tiktoken,
            "fastokens": self.fastokens,
            "gigatoken": self.gigatoken,
        }
        self.trainers: dict[str, Callable[[], Any]] = {
            "tokenizers": self.train_hugging_face,
            "rustbpe": self.train_rustbpe,
            "gigatoken": self.train_gigatoken,
        }
        self.made: dict[str, tuple[Callable, Callable]] = {}

    def hugging_face(self) -> tuple[Callable, Callable]:
        """What encodes, and what turns its result into lists; as the others below."""
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(self.file)
        encoder.encode_special_tokens = True
        return (
            lambda: encoder.encode_batch_fast(self.texts, add_special_tokens=False),
            lambda found: [one.ids for one in found],
        )

    def tiktoken(self) -> tuple[Callable, Callable]:
        """The ranks are the ids of the vocabulary."""
        import tiktoken

        with open(self.file, encoding="utf-8") as file:
            content = json.load(file)
        vocab = content["model"]["vocab"]
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable}
        byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
        ranks = {bytes(byte_of[char] for char in token): rank for token, rank in vocab.items()}
        encoder = tiktoken.Encoding(
            "trained", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        return lambda: [encoder.encode_ordinary(text) for text in self.texts], lambda found: found

    def fastokens(self) -> tuple[Callable, Callable]:
        """Its encodings hold ids that become lists when asked for."""
        from fastokens import Tokenizer

        encoder = Tokenizer.from_file(self.file)
        return lambda: [encoder.encode(text) for text in self.texts], lambda found: [
            one.ids for one in found
        ]

    def gigatoken(self) -> tuple[Callable, Callable]:
        """Its batches are awkward arrays."""
        import gigatoken

        encoder = gigatoken.Tokenizer(self.file)
        return lambda: encoder.encode_batch(self.texts), lambda found: found.to_list()

    def train_hugging_face(self) -> None:
        """Keeps the merges, for comparison."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(self.pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        trainer = trainers.BpeTrainer(
            vocab_size=self.num_tokens,
            min_frequency=0,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(self.texts, trainer)
        self.hf_merges = json.loads(tokenizer.to_str())["model"]["merges"]

    def train_rustbpe(self) -> None:
        """The same pattern, other ties."""
        import rustbpe

        rustbpe.Tokenizer().train_from_iterator(
            iter(self.texts), self.num_tokens, pattern=self.pattern
        )

    def train_gigatoken(self) -> None:
        """GPT-2's pattern: it has no other for training."""
        import gigatoken

        gigatoken.train_bpe("".join(self.texts).encode(), self.num_tokens, [])

    def names(self, works: dict[str, Callable]) -> dict[str, str]:
        """Installed libraries of `works` and their versions."""
        found = {}
        for name in works:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def answer(self, request: dict[str, Any]) -> Any:
        """Do what a request says."""
        if "names" in request:
            return {"encode": self.names(self.encoders), "train": self.names(self.trainers)}
        if "train" in request:
            return cpu_seconds(self.trainers[request["train"]])[0]
        name = request.get("encode") or request["ids"]
        if name not in self.made or request.get("fresh"):
            self.made[name] = self.encoders[name]()
        encode, lists = self.made[name]
        if "encode" in request:
            return cpu_seconds(encode)[0]
        np.save(
            request["path"], np.concatenate([np.asarray(ids, np.uint32) for ids in lists(encode())])
        )
        return None


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    texts = json.loads(Path(setup["texts"]).read_text(encoding="utf-8"))
    peers = Peers(Path(setup["folder"]), texts, setup["pattern"], setup["num_tokens"])
    for line in sys.stdin:
        request = json.loads(line)
        answer = peers.hf_merges if "merges" in request else peers.answer(request)
        print(json.dumps(answer), file=ANSWERS)


if __name__ == "__main__":
    main()
