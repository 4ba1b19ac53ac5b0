"""The stage `cache`: a teacher scores a dataset, once, into the sparse cache.

    xinslm cache TEACHER --data-path data --output-dir cache

Shards are written one by one, each atomically; a run that was stopped continues behind the last whole shard, and the
result is the same. What a shard holds comes from a `Scorer`; this module knows folders only.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, Split, open_dataset
from xinslm.device import pick_device
from xinslm.distill.cache import KIND, PLAN, VERSION, Cache, CacheFormat, decode, suffix
from xinslm.distill.cache_config import CacheConfig
from xinslm.distill.scorers import RECORDS, DenseScorer, Scorer, relate
from xinslm.errors import UsageError
from xinslm.files import MANIFEST, new_file, read_json, refuse_inside, write_json, write_manifest
from xinslm.progress import Listener, Progress, ignore
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.huggingface import HuggingFaceTeacher


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
    push = relate(dataset, teacher)
    vocab_size = dataset.manifest["vocab_size"]
    head = min(config.head, vocab_size - 1)
    fmt = CacheFormat(vocab_size, head, config.draws, config.temperature)
    scorer = DenseScorer(teacher, push, fmt, config)
    _begin(config, _plan(config, dataset, teacher, fmt, scorer))
    _write(config, dataset, scorer, on_progress)
    return _summarise(config.output_dir, time.monotonic() - started)


def _write(config: CacheConfig, dataset: Dataset, scorer: Scorer, on_progress: Listener) -> None:
    """Let the scorer fill every shard that is not there yet, then make the folder whole."""
    shards = {name: _cut(dataset.split(name), config.shard_positions) for name in dataset.manifest["splits"]}
    total = sum(int(dataset.split(name).documents[-1]) for name in shards)
    done = 0
    listed: dict[str, list[dict[str, Any]]] = {}
    for name, cuts in shards.items():
        split = dataset.split(name)
        listed[name] = []
        for number, (first, last) in enumerate(cuts):
            start, end = int(split.documents[first]), int(split.documents[last])
            files = {plane: f"{name}/{number:05d}{suffix(plane)}" for plane in scorer.planes}
            listed[name].append({"file": files[RECORDS], "start": start, "positions": end - start})
            paths = {plane: config.output_dir / file for plane, file in files.items()}
            sizes = {plane: (end - start) * item.itemsize for plane, item in scorer.planes.items()}
            if not all(path.is_file() and path.stat().st_size == sizes[plane] for plane, path in paths.items()):
                base = done

                def tell(positions: int, base: int = base) -> None:
                    on_progress(Progress("cache", base + positions, total, "tokens"))

                scratch = config.output_dir / name / f"{number:05d}.scratch"
                scratch.parent.mkdir(exist_ok=True)
                planes = scorer.shard(split, first, last, scratch, tell)
                for plane, path in paths.items():
                    with new_file(path) as partial:
                        partial.write_bytes(planes[plane].tobytes())  # tofile would lose the errno of a full disk
                scratch.unlink(missing_ok=True)
            done += end - start
            on_progress(Progress("cache", done, total, "tokens"))
    plan = read_json(config.output_dir / PLAN)
    assert isinstance(plan, dict)
    kept = {f"{row['file'].removesuffix('.bin')}{suffix(p)}" for rows in listed.values() for row in rows
            for p in scorer.planes}  # fmt: skip
    _remove_other_files(config.output_dir, kept)
    content = {"format": plan["format"], "planes": sorted(scorer.planes), "shards": listed}
    content["dataset_path"] = str(config.data_path)
    write_manifest(config.output_dir, KIND, VERSION, to_dict(config), plan["inputs"], skip=(PLAN,), **content)
    (config.output_dir / PLAN).unlink()


def _plan(
    config: CacheConfig, dataset: Dataset, teacher: DenseTeacher, fmt: CacheFormat, scorer: Scorer
) -> dict[str, Any]:
    settings = {k: v for k, v in to_dict(config).items() if k not in ("force", "output_dir", "data_path", "teacher")}
    return {
        "format": {
            "vocab_size": fmt.vocab_size, "head": fmt.head, "draws": fmt.draws, "temperature": fmt.temperature,
        },
        "settings": settings,
        "planes": {name: item.itemsize for name, item in scorer.planes.items()},
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
            key for group in ("format", "settings", "planes", "inputs") for key in plan[group]
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
