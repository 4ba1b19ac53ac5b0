"""Ids of many megabytes of mixed text: our BPE against `tokenizers`, `tiktoken` and our Python code.

    python benchmarks/bpe_ids.py FOLDER_OR_FILE ... --tokenizers T1 T2 --train text.txt --megabytes 100

Text is every UTF-8 file below the folders (programs, prose, tables, markup), in an order drawn from
the seed, then each assigned code point between letters, digits and spaces, and strings drawn from
the classes that split rules tell apart. T1, T2 are tokenizer files or folders; `--train` also
trains one for each split rule on that text. Counts the texts whose ids differ, and shows the first.
`tiktoken` (`pip install tiktoken`) is left out where it is absent; it has no split rule of its own,
so it gets the tokenizer's.
"""

import argparse
import gzip
import importlib.util
import os
import random
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from machine import describe
from tokenizers import Tokenizer

from xinslm.native import library_path, reason
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.alphabet import SPLITS

os.environ["TOKENIZERS_PARALLELISM"] = "false"
LONGEST = 100_000
"""Characters of a text: longer files are cut."""
Encode = Callable[[list[str]], list[np.ndarray]]


def files(places: list[Path], seed: int) -> Iterator[str]:
    """Texts of all files that are UTF-8, in a random order, each content once."""
    found = [f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*")))]
    random.Random(seed).shuffle(found)
    seen = set()
    for path in found:
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        if hash(data) in seen or b"\0" in data[:4096]:
            continue
        seen.add(hash(data))
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        yield from (text[at : at + LONGEST] for at in range(0, len(text), LONGEST))


def drawn(seed: int, count: int) -> Iterator[str]:
    """Every assigned code point in contexts, then `count` strings of mixed classes."""
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    for context in ("{}", "a{}b {}", " {}{}\n{}1", "'{}{} \r{}"):
        for at in range(0, len(assigned), 4000):
            yield " | ".join(context.replace("{}", c) for c in assigned[at : at + 4000])
    pools = [list(" \t\r\n\u00a0\u3000"), list("'stremvld"), list("0123456789"), assigned]
    pools += [[c for c in assigned if unicodedata.category(c)[0] == kind] for kind in "LMNPSZ"]
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choice(draw.choice(pools)) for _ in range(draw.randrange(1, 400)))


def of_ours(tokenizer: BPETokenizer) -> Encode:
    """Ours, native or in Python."""

    def encode(texts: list[str]) -> list[np.ndarray]:
        ids, offsets = tokenizer.encode_batch(texts)
        return np.split(ids, offsets[1:-1])

    return encode


def of_hugging_face(folder: Path) -> Encode:
    """The file read by `tokenizers`, special tokens in the text as text."""
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.encode_special_tokens = True
    loaded.no_truncation()

    def encode(texts: list[str]) -> list[np.ndarray]:
        found = loaded.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    return encode


def of_tiktoken(tokenizer: BPETokenizer) -> Encode | None:
    """`tiktoken` with our split rule and the ids as ranks; None without it, or if the
    ids of merges are not in their order, or a byte has no token.
    """
    if importlib.util.find_spec("tiktoken") is None:
        return None
    import tiktoken

    special = set(tokenizer.special_tokens.values())
    pieces = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in special}
    merged = [pieces[a + b] for a, b in of_bytes(tokenizer)]
    if merged != sorted(merged) or any(bytes([byte]) not in pieces for byte in range(256)):
        return None
    pattern = SPLITS[tokenizer.split_name].pattern
    encoder = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=pieces, special_tokens={})
    return lambda texts: [np.array(encoder.encode_ordinary(t), np.uint32) for t in texts]


def of_bytes(tokenizer: BPETokenizer) -> Iterator[tuple[bytes, bytes]]:
    """The merges, spelled in bytes."""
    from xinslm.tokenizer.alphabet import unspell

    for left, right in tokenizer.merges:
        yield unspell(left) or b"", unspell(right) or b""


def compare(name: str, sides: dict[str, Encode], texts: Iterable[str]) -> int:
    """Print a line for each side; return the number of texts that differ."""
    wrong, seconds = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0)
    total = count = tokens = 0
    for batch in batched(texts):
        expected = None
        for side, encode in sides.items():
            began = time.process_time()
            found = encode(batch)
            seconds[side] += time.process_time() - began
            expected = expected or found
            for text, ours, theirs in zip(batch, expected, found, strict=True):
                if not np.array_equal(ours, theirs):
                    wrong[side] += 1
                    if wrong[side] == 1:
                        show(name, side, text, ours, theirs)
        total, count = total + sum(len(text.encode()) for text in batch), count + len(batch)
        tokens += sum(map(len, expected or []))
    for side in list(sides)[1:]:
        speed = f"{total / 1e6 / seconds[side]:.1f} MB/s of CPU time"
        print(
            f"| {name} | {side} | {total / 1e6:.1f} | {count:,} | {tokens:,} | {wrong[side]} | {speed} |",
            flush=True,
        )
    return sum(wrong.values())


def show(name: str, side: str, text: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """The first difference, to standard error."""
    at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    print(
        f"{name}, {side}: token {at} of {text[:80]!a}: {ours[at : at + 5]} {theirs[at : at + 5]}",
        file=sys.stderr,
    )


def batched(texts: Iterable[str], characters: int = 2_000_000) -> Iterator[list[str]]:
    """Lists of texts of about so many characters."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) > characters:
            yield batch
            batch = []
    if batch:
        yield batch


def first(texts: Iterable[str], megabytes: float) -> list[str]:
    """The first texts, so many megabytes of them."""
    taken, size = [], 0
    for text in texts:
        if size > megabytes * 1e6:
            break
        taken.append(text)
        size += len(text.encode())
    return taken


def main() -> None:
    """Compare all tokenizers on all texts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--tokenizers", nargs="*", default=[])
    parser.add_argument("--train", type=Path, help="text to train one tokenizer a split rule on")
    parser.add_argument("--vocab-size", type=int, default=30_000)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--fuzz", type=int, default=20_000, help="strings drawn at random")
    parser.add_argument("--twin", action="store_true", help="compare with our Python code as well")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if library_path() is None:
        sys.exit(f"there is no native library: {reason()}")
    texts = first(files(args.text, args.seed), args.megabytes)
    texts += drawn(args.seed, args.fuzz)
    packages = [
        "numpy",
        "tokenizers",
        *(["tiktoken"] if importlib.util.find_spec("tiktoken") else []),
    ]
    print(describe(tuple(packages)))
    print("| tokenizer | against | MB | texts | ids | texts that differ | speed of that side |")
    print("|---|---|---|---|---|---|---|", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        made = {Path(path).name: BPETokenizer.load(path) for path in args.tokenizers}
        for split in SPLITS if args.train else ():
            trained = BPETokenizer(vocab_size=args.vocab_size, split=split)
            trained.train(first(files([args.train], 0), 20))
            made[f"{split}, trained"] = trained
        for number, (label, tokenizer) in enumerate(made.items()):
            folder = Path(name) / str(number)
            tokenizer.save(folder)
            sides = {"xinslm": of_ours(tokenizer), "tokenizers": of_hugging_face(folder)}
            if (peer := of_tiktoken(tokenizer)) is not None:
                sides["tiktoken"] = peer
            if args.twin:
                os.environ["XINSLM_NATIVE"] = "off"
                twin = BPETokenizer.load(folder)
                assert twin._native is None
                os.environ["XINSLM_NATIVE"] = "auto"
                sides["xinslm in Python"] = of_ours(twin)
            wrong += compare(label, sides, texts)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
