"""The stage `cache`: a teacher scores a dataset, once, into the sparse cache.

    xinslm cache TEACHER --data-path data --output-dir cache

Shards are written one by one, each atomically; a run that was stopped continues behind the last whole shard, and the
result is the same. Sequences are batched by length, the head is applied to a few hundred rows at a time, and only
positions whose next token counts as a target are scored.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, Split, open_dataset
from xinslm.data.packing import sequences
from xinslm.device import pick_device
from xinslm.distill.cache import KIND, PLAN, VERSION, Cache, CacheFormat, decode, encode
from xinslm.distill.config import CacheConfig
from xinslm.distill.nested import PushForward, is_nested
from xinslm.errors import UsageError, XinslmError
from xinslm.files import MANIFEST, new_file, read_json, refuse_inside, write_json, write_manifest
from xinslm.progress import Listener, Progress, ignore
from xinslm.teachers.huggingface import HuggingFaceTeacher, batches_by_length

LOGITS_AT_ONCE = 1 << 22
"""Numbers in one block of logits (16 MiB of float32)."""


@dataclass(frozen=True)
class CacheResult:
    """What `cache` made."""

    folder: Path
    positions: int
    stream_bytes: int
    record_bytes: int
    teacher_nats: float
    tail_mass: float
    seconds: float

    def describe(self) -> str:
        """Lines for the terminal."""
        return (
            f"cache       {self.folder}\n"
            f"positions   {self.positions:,} scored; {self.record_bytes} bytes each, {self.stream_bytes:,} in all\n"
            f"teacher     {self.teacher_nats:.4f} nats a token; {self.tail_mass:.1%} of its mass outside the head\n"
            f"time        {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Work:
    """A run of documents as the teacher reads them, and which of its rows say what about which stream position."""

    tokens: np.ndarray
    """Teacher ids, documents one behind the other."""
    documents: np.ndarray
    """Their offsets."""
    positions: np.ndarray
    """Stream positions to score."""
    labels: np.ndarray
    """The tokens that came there, in the dataset's vocabulary."""
    rows: np.ndarray
    """For each position, the row of `tokens` whose prediction covers it; never falls."""
    prefixes: list[tuple[int, ...]] | None
    """For each position, the pieces of a teacher token that have come; None where the tokenizers are the same."""


def run(config: CacheConfig, on_progress: Listener = ignore) -> CacheResult:
    """Score both splits of a dataset with a teacher.

    Raises UsageError for a teacher whose tokenizer is neither the dataset's nor one it is nested in, and for an output
    folder that holds something else; XinslmError for a teacher that yields numbers that are not finite.
    """
    config.check()
    started = time.monotonic()
    dataset = open_dataset(config.data_path)
    teacher = HuggingFaceTeacher(
        config.teacher, config.dtype, pick_device(config.device), config.revision, config.trust_remote_code
    )
    if config.max_seq_length > teacher.max_length:
        raise UsageError(
            f"max_seq_length is {config.max_seq_length}, but teacher {config.teacher} has a context of "
            f"{teacher.max_length} tokens: pass --max-seq-length {teacher.max_length}"
        )
    push = _relate(dataset, teacher)
    vocab_size = dataset.manifest["vocab_size"]
    head = min(config.head, vocab_size - 1)
    fmt = CacheFormat(vocab_size, head, config.draws, config.temperature)
    plan = _plan(config, dataset, teacher, fmt)
    _begin(config, plan)
    shards = {name: _cut(dataset.split(name), config.shard_positions) for name in dataset.manifest["splits"]}
    total = sum(int(dataset.split(name).documents[-1]) for name in shards)
    done = 0
    listed: dict[str, list[dict[str, Any]]] = {}
    for name, cuts in shards.items():
        split = dataset.split(name)
        listed[name] = []
        for number, (first, last) in enumerate(cuts):
            file = f"{name}/{number:05d}.bin"
            start, end = int(split.documents[first]), int(split.documents[last])
            listed[name].append({"file": file, "start": start, "positions": end - start})
            path = config.output_dir / file
            if not (path.is_file() and path.stat().st_size == (end - start) * fmt.dtype.itemsize):
                base = done

                def tell(positions: int, base: int = base) -> None:
                    on_progress(Progress("cache", base + positions, total, "tokens"))

                work = _work(split, first, last, push)
                records = _score(work, start, end - start, teacher, push, fmt, config, tell)
                with new_file(path) as partial:
                    partial.write_bytes(records.tobytes())  # tofile would lose the errno of a full disk
            done += end - start
            on_progress(Progress("cache", done, total, "tokens"))
    inputs = plan["inputs"]
    content = {"format": plan["format"], "shards": listed, "dataset_path": str(config.data_path)}
    _remove_other_files(config.output_dir, {shard["file"] for rows in listed.values() for shard in rows})
    write_manifest(config.output_dir, KIND, VERSION, to_dict(config), inputs, skip=(PLAN,), **content)
    (config.output_dir / PLAN).unlink()
    return _summarise(config.output_dir, time.monotonic() - started)


def _relate(dataset: Dataset, teacher: HuggingFaceTeacher) -> PushForward | None:
    """None where teacher and dataset share their tokenizer, a push-forward where the dataset's is nested."""
    from xinslm.tokenizer.load import load_tokenizer

    if teacher.tokenizer.fingerprint() == dataset.tokenizer_fingerprint:
        return None
    own = load_tokenizer(dataset.folder / "tokenizer")
    if is_nested(own, teacher.tokenizer):
        return PushForward(own, teacher.tokenizer)
    raise UsageError(
        f"dataset {dataset.folder} and teacher {teacher.name} have different tokenizers ({own.vocab_size:,} and "
        f"{teacher.vocab_size:,} ids), and the dataset's is not a merge prefix of the teacher's. Prepare the dataset "
        f"with the teacher's own tokenizer (`xinslm prepare --tokenizer-path {teacher.name}`), or with a nested one "
        f"(`xinslm tokenizer train --prefix-of {teacher.name}`)"
    )


def _plan(config: CacheConfig, dataset: Dataset, teacher: HuggingFaceTeacher, fmt: CacheFormat) -> dict[str, Any]:
    settings = {k: v for k, v in to_dict(config).items() if k not in ("force", "output_dir", "data_path", "teacher")}
    return {
        "format": {
            "vocab_size": fmt.vocab_size, "head": fmt.head, "draws": fmt.draws, "temperature": fmt.temperature,
        },
        "settings": settings,
        "inputs": {
            "dataset": dataset.fingerprint,
            "tokenizer": dataset.tokenizer_fingerprint,
            "teacher": teacher.fingerprint,
            "teacher_tokenizer": teacher.tokenizer.fingerprint(),
        },
    }  # fmt: skip


def _begin(config: CacheConfig, plan: dict[str, Any]) -> None:
    """Make the folder, or find that an unfinished cache of the very same plan stands there."""
    folder, note = config.output_dir, config.output_dir / PLAN
    if config.force and (note.is_file() or _is_cache(folder)):
        refuse_inside(folder, (config.teacher, config.data_path))
        shutil.rmtree(folder)
    if note.is_file():
        found = read_json(note)
        differing = [
            key for group in ("format", "settings", "inputs") for key in plan[group]
            if found.get(group, {}).get(key) != plan[group][key]
        ]  # fmt: skip
        if differing:
            raise UsageError(
                f"{folder} holds an unfinished cache made with another {', '.join(differing)}. Run the command that "
                f"began it, choose another --output-dir, or add --force to begin anew"
            )
        return
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        hint = "or add --force to replace it" if _is_cache(folder) else "it is not a cache"
        raise UsageError(f"{folder} already holds something. Choose another --output-dir ({hint})")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, plan)


def _is_cache(folder: Path) -> bool:
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def _remove_other_files(folder: Path, listed: set[str]) -> None:
    """Drop what killed runs left: temporary files that no shard is called."""
    for file in folder.glob("*/*"):
        if file.is_file() and file.relative_to(folder).as_posix() not in listed:
            file.unlink()


def _cut(split: Split, shard_positions: int) -> list[tuple[int, int]]:
    """Ranges of documents of about `shard_positions` tokens each."""
    cuts, first, count = [], 0, len(split.documents) - 1
    while first < count:
        target = int(split.documents[first]) + shard_positions
        last = int(np.searchsorted(split.documents, target, side="left"))
        last = min(max(last, first + 1), count)
        cuts.append((first, last))
        first = last
    return cuts


def _work(split: Split, first: int, last: int, push: PushForward | None) -> Work:
    """Lay out documents `first` to `last` for the teacher."""
    documents = np.asarray(split.documents[first : last + 1], dtype=np.int64)
    start, end = int(documents[0]), int(documents[-1])
    tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
    counts = np.asarray(split.mask[start:end]) != 0
    targets = np.flatnonzero(counts)
    if push is None:
        return Work(tokens, documents - start, start + targets - 1, tokens[targets], targets - 1, None)
    rows = np.full(len(tokens), -1, dtype=np.int64)
    prefixes: list[tuple[int, ...]] = [()] * len(tokens)
    teacher_tokens: list[np.ndarray] = []
    offsets = [0]
    for a, b in zip(documents[:-1] - start, documents[1:] - start, strict=True):
        aligned = push.align(tokens[a:b])
        rows[a + 1 : b] = aligned.rows + offsets[-1]
        prefixes[a + 1 : b] = aligned.prefixes
        teacher_tokens.append(aligned.teacher_ids)
        offsets.append(offsets[-1] + len(aligned.teacher_ids))
    return Work(
        np.concatenate(teacher_tokens), np.array(offsets), start + targets - 1, tokens[targets], rows[targets],
        [prefixes[t] for t in targets],
    )  # fmt: skip


def _score(
    work: Work, start: int, count: int, teacher: HuggingFaceTeacher, push: PushForward | None, fmt: CacheFormat,
    config: CacheConfig, tell: Callable[[int], None],
) -> np.ndarray:  # fmt: skip
    """Records of one shard, (count,); positions that are no targets keep flag 0."""
    records = np.zeros(count, dtype=fmt.dtype)
    starts, lengths = sequences(work.documents, config.max_seq_length)
    chunk = max(1, LOGITS_AT_ONCE // teacher.vocab_size)
    seen = 0
    for batch in batches_by_length(lengths, config.batch_tokens):
        states = teacher.states([work.tokens[starts[k] : starts[k] + lengths[k]] for k in batch])
        picked, offset = [], 0
        state_rows = []
        for k in batch:
            low, high = np.searchsorted(work.rows, (starts[k], starts[k] + lengths[k]))
            picked.append(np.arange(low, high))
            state_rows.append(work.rows[low:high] - starts[k] + offset)
            offset += int(lengths[k])
        which, of_state = np.concatenate(picked), np.concatenate(state_rows)
        for at in range(0, len(which), chunk):
            part = which[at : at + chunk]
            logits = teacher.logits(states[torch.from_numpy(of_state[at : at + chunk]).to(states.device)])
            probs = torch.softmax(logits, dim=1)
            if push is not None and work.prefixes is not None:
                probs = push(probs, [work.prefixes[i] for i in part])
            records[work.positions[part] - start] = _encode(probs, work, part, fmt, config.seed, teacher.name)
        seen += int(lengths[batch].sum())
        tell(min(seen, count))
    return records


def _encode(probs: Tensor, work: Work, part: np.ndarray, fmt: CacheFormat, seed: int, name: str) -> np.ndarray:
    if probs.device.type == "mps":  # no float64 there, which the draws need
        probs = probs.cpu()
    device = probs.device
    labels = torch.from_numpy(work.labels[part]).to(device)
    positions = torch.from_numpy(work.positions[part]).to(device)
    try:
        return encode(probs, labels, positions, fmt, seed)
    except FloatingPointError as error:
        raise XinslmError(
            f"teacher {name}: {error}. Try --dtype float32, or look at the weights; finished shards are kept"
        ) from None


def _summarise(folder: Path, seconds: float) -> CacheResult:
    cache = Cache(folder)
    positions, size, nats, tail = 0, 0, 0.0, 0.0
    for name in cache.manifest["shards"]:
        split = cache.split(name)
        assert split is not None
        for records in split.maps:
            size += records.nbytes
            valid = records[(records["flags"] & 1) != 0]
            positions += len(valid)
            nats -= float(valid["log_label"].astype(np.float64).sum())
            tail += (
                float(np.exp(decode(valid, cache.format).log_tail.numpy()).sum(dtype=np.float64)) if len(valid) else 0.0
            )
    average = max(positions, 1)
    return CacheResult(folder, positions, size, cache.format.dtype.itemsize, nats / average, tail / average, seconds)
