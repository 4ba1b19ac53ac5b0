"""Writing a cache: shards one by one, each atomically; a run that was stopped continues after the
last complete shard, with the same result. What a shard holds comes from a `Scorer`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache.bucket_entries import bucket_maps, count_buckets
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import (
    FP16_FLOOR,
    KIND,
    PLAN,
    VALID,
    VERSION,
    Cache,
    CacheFormat,
    decode,
    suffix,
)
from xinslm.cache.projected_states import (
    HIDDEN_STATES,
    CachedHiddenStates,
    HiddenStateFormat,
    facts,
)
from xinslm.cache.quality import teacher_warning
from xinslm.cache.repair import reopen
from xinslm.cache.scorers import ENTRIES, Scorer
from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, Split
from xinslm.files import new_file, read_json, write_manifest
from xinslm.folders import Plan, claim, locked
from xinslm.progress import Listener, Progress
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.encoder import EncoderTeacher
from xinslm.teachers.endpoint import EndpointTeacher

PLACES = (
    "force",
    "repair",
    "output_dir",
    "data_path",
    "teacher",
    "teacher_tokenizer_path",
    "endpoint",
    "adapter",
)
"""Settings that say where things are and how they are reached, not what is computed."""


@dataclass(frozen=True)
class CacheResult:
    """What `cache` made."""

    folder: Path
    positions: int
    stream_bytes: int
    entry_bytes: int
    teacher_nats: float
    tail_mass: float
    seconds: float
    hidden_state_positions: int = 0
    """Positions that have projected hidden states of the teacher's."""
    hidden_state_bytes: int = 0
    """Bytes of one position's projected hidden states."""
    alignment: str = "same"
    """The way from the teacher's tokenizer to the dataset's."""
    share: float = 1.0
    """Part of the targets of which the teacher says something."""
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """Lines for the terminal."""
        lines = [f"cache       {self.folder}"]
        if self.alignment != "same":
            lines.append(
                f"alignment   {self.alignment}; {self.share:.1%} of the targets have the "
                "teacher's word"
            )
        if self.positions:
            lines += [
                f"positions   {self.positions:,} scored of "
                f"{self.stream_bytes // self.entry_bytes:,} in the stream; "
                f"{self.entry_bytes} bytes each, {self.stream_bytes:,} in all",
                f"teacher     {self.teacher_nats:.4f} nats a token; {self.tail_mass:.1%} of its "
                "mass outside the top k",
            ]
        if self.hidden_state_bytes:
            lines.append(
                f"hidden      states of {self.hidden_state_positions:,} positions; "
                f"{self.hidden_state_bytes} bytes each"
            )
        lines.append(f"time        {self.seconds:.0f} s")
        return "\n".join([*lines, *(f"warning     {warning}" for warning in self.warnings)])


def write_cache(
    config: CacheConfig,
    dataset: Dataset,
    plan: dict[str, Any],
    scorer: Scorer,
    on_progress: Listener,
) -> CacheResult:
    """Write the cache that `plan` describes and `scorer` fills, or continue it."""
    started = time.monotonic()
    with _claimed(config, plan):
        _write(config, dataset, scorer, on_progress)
    cache = Cache(config.output_dir)
    result = _summarise(cache, time.monotonic() - started)
    warning = teacher_warning(cache, dataset)
    return replace(result, warnings=(warning,)) if warning else result


def cache_plan(
    config: CacheConfig,
    dataset: Dataset,
    teacher: DenseTeacher | EncoderTeacher | EndpointTeacher,
    fmt: CacheFormat,
    scorer: Scorer,
    projected_states: HiddenStateFormat | None = None,
    alignment: str = "same",
) -> dict[str, Any]:
    """What a cache follows from; `teacher` is named by its fingerprint and its tokenizer's."""
    settings = {k: v for k, v in to_dict(config).items() if k not in PLACES}
    return {
        "format": asdict(fmt),
        "settings": settings,
        "arrays": {name: item.itemsize for name, item in scorer.arrays.items()},
        "inputs": {
            "dataset": dataset.fingerprint,
            "tokenizer": dataset.tokenizer_fingerprint,
            "teacher": teacher.fingerprint,
            "teacher_tokenizer": teacher.tokenizer.fingerprint(),
        },
        "alignment": {"kind": alignment},
        **({} if projected_states is None else {HIDDEN_STATES: facts(projected_states)}),
    }


@contextmanager
def _claimed(config: CacheConfig, plan: dict[str, Any]) -> Iterator[None]:
    """Hold the cache folder, begun or continued; with `repair`, a finished one is reopened."""
    folder = config.output_dir
    with locked(folder):
        if config.repair and not (folder / PLAN).is_file():
            reopen(folder, plan)
        reads = (config.teacher, config.data_path)
        with claim(folder, Plan(PLAN, plan, "cache", KIND, reads), config.force):
            pass
        yield


def _write(config: CacheConfig, dataset: Dataset, scorer: Scorer, on_progress: Listener) -> None:
    """Let the scorer fill every shard that is not there yet, then make the folder whole."""
    shards = {
        name: _cut(dataset.split(name), config.shard_positions)
        for name in dataset.manifest["splits"]
    }
    total = sum(int(dataset.split(name).documents[-1]) for name in shards)
    done = 0
    listed: dict[str, list[dict[str, Any]]] = {}
    for name, cuts in shards.items():
        split = dataset.split(name)
        listed[name] = []
        for number, (first, last) in enumerate(cuts):
            start, end = int(split.documents[first]), int(split.documents[last])
            files = {array: f"{name}/{number:05d}{suffix(array)}" for array in scorer.arrays}
            listed[name].append({"file": files[ENTRIES], "start": start, "positions": end - start})
            paths = {array: config.output_dir / file for array, file in files.items()}
            sizes = {array: (end - start) * item.itemsize for array, item in scorer.arrays.items()}
            if not all(
                path.is_file() and path.stat().st_size == sizes[array]
                for array, path in paths.items()
            ):
                base = done

                def tell(positions: int, base: int = base) -> None:
                    on_progress(Progress("cache", base + positions, total, "tokens"))

                scratch = config.output_dir / name / f"{number:05d}.scratch"
                scratch.parent.mkdir(exist_ok=True)
                arrays = scorer.shard(split, first, last, scratch, tell)
                for array, path in paths.items():
                    with new_file(path) as partial:
                        # tofile would lose the errno of a full disk
                        partial.write_bytes(arrays[array].tobytes())
                scratch.unlink(missing_ok=True)
            done += end - start
            on_progress(Progress("cache", done, total, "tokens"))
    plan = read_json(config.output_dir / PLAN)
    assert isinstance(plan, dict)
    kept = {
        f"{row['file'].removesuffix('.bin')}{suffix(p)}"
        for rows in listed.values()
        for row in rows
        for p in scorer.arrays
    }
    _remove_other_files(config.output_dir, kept)
    content = {
        "format": plan["format"],
        "settings": plan["settings"],
        "arrays": sorted(scorer.arrays),
    }
    content |= {"shards": listed, "dataset_path": str(config.data_path)}
    covered = _covered(config.output_dir, dataset, listed, scorer)
    content["alignment"] = plan.get("alignment", {"kind": "same"}) | covered
    if HIDDEN_STATES in plan:
        content[HIDDEN_STATES] = plan[HIDDEN_STATES]
    write_manifest(
        config.output_dir, KIND, VERSION, to_dict(config), plan["inputs"], skip=(PLAN,), **content
    )
    (config.output_dir / PLAN).unlink()


def _covered(
    folder: Path, dataset: Dataset, listed: dict[str, list[dict[str, Any]]], scorer: Scorer
) -> dict[str, int]:
    """How many positions count as targets, and of how many of them the entries say something."""
    item = scorer.arrays[ENTRIES]
    files = [
        np.memmap(folder / row["file"], dtype=item, mode="r")
        for rows in listed.values()
        for row in rows
    ]
    targets = sum(dataset.manifest["splits"][name]["targets"] for name in listed)
    return {
        "targets": targets,
        "covered": sum(int(np.count_nonzero(file["flags"] & VALID)) for file in files),
    }


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


def _summarise(cache: Cache, seconds: float) -> CacheResult:
    alignment = cache.manifest["alignment"]
    if alignment["kind"] == "byte_prefix":
        return _summarise_buckets(cache, seconds)
    positions, size, nats, tail = 0, 0, 0.0, 0.0
    for name in cache.manifest["shards"]:
        split = cache.split(name)
        if split is None:
            continue
        for entries in split.maps:
            size += entries.nbytes
            valid = entries[(entries["flags"] & 1) != 0]
            positions += len(valid)
            label_log_probs = valid["log_label"].astype(
                np.float64
            )  # at the floor where it is not known
            nats -= float(label_log_probs[label_log_probs > FP16_FLOOR].sum())
            tail += (
                float(np.exp(decode(valid, cache.format).log_tail.numpy()).sum(dtype=np.float64))
                if len(valid)
                else 0.0
            )
    hidden_state_positions = hidden_state_bytes = 0
    if HIDDEN_STATES in cache.manifest:
        arrays = [CachedHiddenStates(cache, name) for name in cache.manifest["shards"]]
        hidden_state_positions, hidden_state_bytes = (
            sum(array.count() for array in arrays),
            arrays[0].format.dtype.itemsize,
        )
    average, entry_bytes = max(positions, 1), cache.format.dtype.itemsize
    return CacheResult(
        cache.folder,
        positions,
        size,
        entry_bytes,
        nats / average,
        tail / average,
        seconds,
        hidden_state_positions,
        hidden_state_bytes,
        alignment["kind"],
        alignment["covered"] / max(alignment["targets"], 1),
    )


def _summarise_buckets(cache: Cache, seconds: float) -> CacheResult:
    splits = [bucket_maps(cache, name) for name in cache.manifest["shards"]]
    counts = np.array([count_buckets(maps) for maps in splits]).sum(axis=0)
    alignment, size = (
        cache.manifest["alignment"],
        sum(shard.nbytes for maps in splits for shard in maps),
    )
    return CacheResult(
        cache.folder,
        int(counts[0]),
        size,
        splits[0][0].dtype.itemsize,
        -counts[1] / max(counts[2], 1),
        0.0,
        seconds,
        alignment="byte_prefix",
        share=alignment["covered"] / max(alignment["targets"], 1),
    )
