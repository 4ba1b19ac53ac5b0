"""`distill` from a cache against TRL's GKDTrainer and DistillationTrainer: speed on full and on ragged
rows, and the memory of the loss.

    python benchmarks/against_gkd.py --data ../shared/data --work /tmp/core --peer-python
    trl-venv/bin/python

A 46M teacher and a 14M student, vocabulary 32,000, weights drawn at random (their values do not
change the work); or, with --teacher and --student, two model folders of one tokenizer, on the first
--chats chats. The peer gets the very tokens of our rows; the forward KL of the first rows is
compared before anything is timed. Tokens are targets: what a pad, a prompt or a row's end costs is
counted against whoever has it. Also timed here: what the cache costs over plain cross-entropy, and
three merged teachers against one.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch
from machine import describe
from sides import figures_of, in_turn, keep, median, ratios, xinslm

from xinslm.config import to_dict
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.data.prepare import KIND, VERSION
from xinslm.data.writer import SplitWriter
from xinslm.files import write_manifest
from xinslm.folders import new_folder
from xinslm.model.config import ModelConfig
from xinslm.model.files import save_model
from xinslm.model.transformer import Transformer
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train.row_sampler import indices_of_step

HERE = Path(__file__).parent
BLOCK = 512
TEACHER = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
}
STUDENT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
}


def make_tokenizer(data: Path, work: Path) -> Path:
    """A vocabulary of 32,000 from technical English and instructions, with a chat template."""
    folder = work / "tokenizer"
    if not folder.is_dir():
        texts = f"{data}/text/peps.jsonl.gz {data}/instruct/alpaca_en_demo.json.gz"
        xinslm(f"tokenizer train --data-path {texts} --vocab-size 32000 --output-dir {folder}")
    return folder


def make_model(folder: Path, sizes: dict, tokenizer: Path, seed: int) -> Path:
    """A model folder with weights drawn from `seed`."""
    if not folder.is_dir():
        ids = load_tokenizer(tokenizer)
        config = ModelConfig(
            vocab_size=ids.vocab_size,
            num_key_value_heads=sizes["num_attention_heads"] // 2,
            head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
            max_position_embeddings=BLOCK,
            bos_token_id=ids.bos_id,
            eos_token_id=ids.eos_id,
            pad_token_id=ids.pad_id,
            **sizes,
        )
        model = Transformer(config)
        model.initialise(torch.Generator().manual_seed(seed))
        with new_folder(folder) as partial:
            save_model(model, partial)
            ids.save(partial)
    return folder


def equal_blocks(source: Path, folder: Path, count: int) -> Path:
    """A dataset of `count` documents of exactly BLOCK tokens, cut from another one's stream."""
    if not folder.is_dir():
        dataset = open_dataset(source)
        tokens = np.asarray(dataset.split("train").tokens[: count * BLOCK]).reshape(count, BLOCK)
        mask = np.ones(BLOCK, np.uint8)
        mask[0] = 0
        with new_folder(folder) as partial:
            with SplitWriter(partial / "train", tokens.dtype) as writer:
                for row in tokens:
                    writer.append(row, mask, BLOCK)
                splits = {"train": writer.finish()}
            ids = load_tokenizer(source / "tokenizer")
            ids.save(partial / "tokenizer")
            config = PrepareConfig(
                data_path=(str(source),), tokenizer_path=source, output_dir=folder
            )
            write_manifest(
                partial,
                KIND,
                VERSION,
                to_dict(config),
                {"tokenizer": ids.fingerprint()},
                splits=splits,
                **{key: dataset.manifest[key] for key in ("vocab_size", "dtype", "document_end")},
            )
    return folder


def export_documents(
    data: Path, order: np.ndarray | None, out: Path, longest: int = BLOCK, name: str = "train"
) -> Path:
    """Documents of a split for the peer, labels unshifted; in the order of our rows where that is
    given.
    """
    split = open_dataset(data).split(name)
    ids, labels, offsets = [], [], [0]
    for number in range(len(split.documents) - 1) if order is None else order:
        a, b = (
            int(split.documents[number]),
            min(int(split.documents[number + 1]), int(split.documents[number]) + longest),
        )
        tokens = np.asarray(split.tokens[a:b]).astype(np.int64)
        ids.append(tokens)
        labels.append(np.where(np.asarray(split.mask[a:b]) != 0, tokens, -100))
        offsets.append(offsets[-1] + len(tokens))
    np.savez(
        out, input_ids=np.concatenate(ids), labels=np.concatenate(labels), offsets=np.array(offsets)
    )
    return out


def documents_of_rows(data: Path, length: int, batch_size: int, steps: int) -> np.ndarray:
    """Documents in the order in which our steps see them, where every row is one document; first
    row 0, 1, ... .
    """
    split = open_dataset(data).split("train")
    rows = PackedDataset(split, length)
    order = np.concatenate(
        [indices_of_step(step, batch_size, len(rows), 0) for step in range(steps)]
    )
    streams = rows.batch(order).stream[:, 0]
    return np.searchsorted(split.documents, streams, side="right") - 1


def instructions(data: Path, out: Path, count: int | None) -> Path:
    """The first `count` real instructions, or all, as JSON lines."""
    if not out.is_file():
        with gzip.open(
            data / "instruct" / "alpaca_en_demo.json.gz", "rt", encoding="utf-8"
        ) as file:
            rows = json.load(file)
        out.write_text("\n".join(json.dumps(row) for row in rows[:count]))
    return out


def speed(
    args: argparse.Namespace, name: str, data: Path, models: tuple[Path, Path], length: int
) -> None:
    """Tokens a second of both sides on one dataset."""
    teacher, student = models
    cache = args.work / f"cache-{name}"
    if not (cache / "manifest.json").is_file():
        xinslm(f"cache {teacher} --data-path {data} --output-dir {cache} --max-seq-length {length}")
    order = (
        documents_of_rows(data, length, args.batch_size, args.steps) if name == "equal" else None
    )
    rows = export_documents(data, order, args.work / f"{name}.npz")
    ours = [
        sys.executable,
        str(HERE / "own_steps.py"),
        "--model",
        str(student),
        "--data",
        str(data),
        "--cache",
        str(cache),
        "--steps",
        str(args.steps),
        "--batch-size",
        str(args.batch_size),
        "--length",
        str(length),
    ]
    peer = [
        args.peer_python,
        str(HERE / "peers" / "trl_gkd.py"),
        "--teacher",
        str(teacher),
        "--student",
        str(student),
        "--rows",
        str(rows),
        "--steps",
        str(args.steps),
        "--batch-size",
        str(args.batch_size),
    ]
    distillation = [args.peer_python, str(HERE / "peers" / "trl_distillation.py"), *peer[2:]]
    if name == "equal":
        first = export_documents(
            data, documents_of_first(data, length, args.batch_size), args.work / "first.npz"
        )
        a = figures_of([*ours, "--teacher", str(teacher)])["first_loss"]
        for side in (peer, distillation):
            check = [*side[:7], str(first), "--steps", "1", "--batch-size", str(args.batch_size)]
            b = figures_of(check)["first_loss"]
            if abs(a - b) > 1e-4 * max(1, abs(b)):
                sys.exit(f"the losses differ before training: {a} and {b} ({side[1]})")
            print(f"forward KL of the first rows: {a:.6f} and {b:.6f}", flush=True)
    sides = {"ours": [*ours, "--compute-dtype", "float32"], "gkd": peer}
    sides["distillation trainer"] = distillation
    if args.bfloat16:
        sides = {"ours": [*ours, "--compute-dtype", "bfloat16"], "gkd": [*peer, "--bf16"]}
        sides["gkd, float32"] = peer
        sides["distillation trainer"] = [*distillation, "--bf16"]
    elif name == "equal":
        sides["gkd, its default gradient checkpointing"] = [*peer, "--gradient-checkpointing"]
    else:  # as many tokens a step as ours has: more padding, fewer optimiser steps
        sides["gkd, longer steps"] = [*peer[:-1], str(3 * args.batch_size)]
    found = in_turn(sides, args.rounds)
    keep(
        args.work,
        f"tokens/s, {name}",
        {side: median(results, "overall") for side, results in found.items()}
        | {
            f"ratio to {side}": ratios(found["ours"], found[side], "overall")
            for side in sides
            if side != "ours"
        }
        | {f"peak MiB, {side}": median(found[side], "peak_mib") for side in sides}
        | {"our rows filled": found["ours"][0]["fill"]},
    )


def documents_of_first(data: Path, length: int, batch_size: int) -> np.ndarray:
    """Documents of rows 0 to batch_size - 1."""
    split = open_dataset(data).split("train")
    streams = PackedDataset(split, length).batch(np.arange(batch_size)).stream[:, 0]
    return np.searchsorted(split.documents, streams, side="right") - 1


def loss_memory(args: argparse.Namespace) -> None:
    """Peak memory and time of each loss with its backward pass, 2,048 rows from hidden states
    on.
    """
    script = str(HERE / "peers" / "loss_memory.py")
    sides = {side: [sys.executable, script, side] for side in ("xinslm", "xinslm-dense", "top-k")}
    sides |= {side: [args.peer_python, script, side] for side in ("gkd", "trl-distillation")}
    found = in_turn(sides, args.rounds)
    ours = median(found["xinslm"], "mib")
    for key in ("mib", "seconds"):
        keep(
            args.work,
            f"loss and backward, {key}",
            {side: median(found[side], key) for side in sides},
        )
    keep(
        args.work,
        "memory of the loss against ours",
        {side: median(found[side], "mib") / ours for side in sides},
    )


PARTS = ("memory", "equal", "ragged", "overhead")


def overhead(args: argparse.Namespace, data: Path, student: Path, merged: Path) -> None:
    """Step time with a cache, and with three teachers merged, over plain cross-entropy, step by
    step in turn.
    """
    command = [
        sys.executable,
        str(HERE / "own_steps.py"),
        "--model",
        str(student),
        "--data",
        str(data),
        "--cache",
        str(args.work / "cache-equal"),
        str(merged),
        "--both",
        "--steps",
        str(3 * args.steps),
        "--batch-size",
        str(args.batch_size),
        "--length",
        str(BLOCK - 1),
    ]
    found = [figures_of(command) for _ in range(args.rounds)]
    over = [row["to_last"] for row in found]
    keep(
        args.work,
        "step time over plain cross-entropy",
        {"one cache": sorted(o[0] for o in over), "three merged": sorted(o[1] for o in over)},
    )
    keep(args.work, "three teachers against one", {"ratio": sorted(o[1] / o[0] for o in over)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and instruct/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--teacher", type=Path, help="a real teacher; takes --student too")
    parser.add_argument("--student", type=Path)
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision on both sides")
    parser.add_argument("--chats", type=int, help="chats for ragged rows; all if not given")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(describe(), flush=True)
    if args.teacher:
        teachers, student, tokenizer = [args.teacher], args.student, args.teacher
    else:
        tokenizer = make_tokenizer(args.data, args.work)
        teachers = [
            make_model(args.work / f"teacher-{seed}", TEACHER, tokenizer, seed) for seed in range(3)
        ]
        student = make_model(args.work / "student", STUDENT, tokenizer, 9)
    peps, chats = args.work / "peps", args.work / "chats"
    if not peps.is_dir():
        xinslm(
            f"prepare --data-path {args.data}/text/peps.jsonl.gz --tokenizer-path {tokenizer} "
            f"--output-dir {peps} "
            f"--max-tokens 200000"
        )
    equal = equal_blocks(peps, args.work / "blocks", 4 * args.steps * args.batch_size)
    if not chats.is_dir():
        jsonl = instructions(args.data, args.work / "instructions.jsonl", args.chats)
        xinslm(f"prepare --data-path {jsonl} --tokenizer-path {tokenizer} --output-dir {chats}")
    if "memory" in args.parts:
        loss_memory(args)
    if "equal" in args.parts:
        speed(args, "equal", equal, (teachers[0], student), BLOCK - 1)
    if "ragged" in args.parts:
        speed(args, "ragged", chats, (teachers[0], student), BLOCK)
    if "overhead" not in args.parts or args.teacher:
        return
    merged = args.work / "cache-merged"
    if not (merged / "manifest.json").is_file():
        parts = [args.work / "cache-equal"]
        for number in (1, 2):
            part = args.work / f"cache-equal-{number}"
            if not (part / "manifest.json").is_file():
                xinslm(
                    f"cache {teachers[number]} --data-path {equal} --output-dir {part} "
                    f"--max-seq-length {BLOCK - 1}"
                )
            parts.append(part)
        xinslm(f"cache merge {' '.join(map(str, parts))} --output-dir {merged}")
    overhead(args, equal, student, merged)


if __name__ == "__main__":
    main()
