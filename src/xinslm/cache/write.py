"""Writing a cache, shard by shard, each atomically; the content comes from a `Scorer`.

An interrupted run continues after the last complete shard, and inside a shard from the scorer's
journal. The finished cache is byte-identical to an uninterrupted one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import ENTRIES, VALID, CacheFormat, suffix
from xinslm.cache.entry_files import Layout, file_of, layouts
from xinslm.cache.folder import HIDDEN_STATES, KIND, PLAN, VERSION, Cache
from xinslm.cache.kinds import kind_of, known_log_labels
from xinslm.cache.projected_states import CachedHiddenStates, HiddenStateFormat
from xinslm.cache.quality import teacher_warning
from xinslm.cache.repair import reopen
from xinslm.cache.scorers import Scorer, cut_documents
from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, Split
from xinslm.files import new_file, read_json, write_manifest
from xinslm.folders import Plan, claim, locked
from xinslm.heap import HeapKeeper
from xinslm.progress import Listener, Progress
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.encoder import EncoderTeacher
from xinslm.teachers.endpoint import EndpointTeacher

_WHERE = ("output_dir", "data_path", "teacher", "teacher_tokenizer_path")
PLACES = ("force", "repair", *_WHERE, "endpoint", "adapter")
"""Settings that do not change the result: locations and access."""


@dataclass(frozen=True)
class CacheResult:
    """What `cache` made."""

    folder: Path
    positions: int
    """Covered positions."""
    stream_bytes: int
    teacher_nats: float
    """Mean of -log p of the labels, where it is known."""
    tail_mass: float
    """Mean mass outside the top k."""
    stored: int
    """Positions in the stream."""
    seconds: float
    hidden_state_positions: int = 0
    """Positions that have projected hidden states."""
    hidden_state_bytes: int = 0
    """Bytes of one position's projected hidden states."""
    alignment: str = "same"
    """How the teacher's tokens map to the dataset's."""
    share: float = 1.0
    """Covered part of the targets."""
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """Lines for the terminal."""
        lines = [f"cache       {self.folder}"]
        if self.alignment != "same":
            lines.append(f"alignment   {self.alignment}; covers {self.share:.1%} of the targets")
        if self.positions:
            lines += [
                f"positions   {self.positions:,} scored of {self.stored:,} in the stream; "
                f"{self.stream_bytes / self.stored:.1f} bytes each, {self.stream_bytes:,} in all",
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
    """Write the cache that `plan` describes, or continue it."""
    started = time.monotonic()
    with _claimed(config, plan):
        _write(config, dataset, plan["format"], scorer, on_progress)
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
    """Everything that determines a cache's content; teachers are identified by fingerprints."""
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
        **({} if projected_states is None else {HIDDEN_STATES: asdict(projected_states)}),
    }


@contextmanager
def _claimed(config: CacheConfig, plan: dict[str, Any]) -> Iterator[None]:
    """Lock the cache folder, new or unfinished; with `repair`, a finished one is reopened."""
    folder = config.output_dir
    with locked(folder):
        if config.repair and not (folder / PLAN).is_file():
            reopen(folder, plan)
        reads = (config.teacher, config.data_path)
        with claim(folder, Plan(PLAN, plan, "cache", KIND, reads), config.force):
            pass
        yield


def _write(
    config: CacheConfig,
    dataset: Dataset,
    fmt: dict[str, Any],
    scorer: Scorer,
    on_progress: Listener,
) -> None:
    """Let the scorer fill every missing shard, then write the manifest."""
    splits = [dataset.split(name) for name in dataset.manifest["splits"]]
    total = sum(int(split.documents[-1]) for split in splits)
    done, heap = 0, HeapKeeper()
    listed: dict[str, list[dict[str, Any]]] = {split.name: [] for split in splits}
    files = layouts(scorer.arrays, CacheFormat(**fmt))
    for split in splits:
        cuts = cut_documents(split.documents, config.shard_positions)
        for number, (first, last) in enumerate(cuts):
            start, end = int(split.documents[first]), int(split.documents[last])
            stem = f"{split.name}/{number:05d}"
            file = stem + suffix(ENTRIES)
            listed[split.name].append({"file": file, "start": start, "positions": end - start})

            def report(positions: int, base: int = done) -> None:
                heap.after_step()
                on_progress(Progress("cache", base + positions, total, "tokens"))

            _write_shard(config.output_dir / stem, scorer, files, split, (first, last), report)
            done += end - start
            report(end - start)
    _finish(config, dataset, files, listed)


def _write_shard(
    stem: Path,
    scorer: Scorer,
    files: list[Layout],
    split: Split,
    documents: tuple[int, int],
    report: Callable[[int], None],
) -> None:
    """Write the files of one shard unless they are there."""
    first, last = documents
    count = int(split.documents[last] - split.documents[first])
    if all(layout.is_complete(stem, count) for layout in files):
        return
    stem.parent.mkdir(exist_ok=True)
    scratch = file_of(stem, ".scratch")
    arrays = scorer.shard(split, first, last, scratch, report)
    for layout in files:
        parts = zip(layout.suffixes, layout.pack(arrays[layout.array]), strict=True)
        for ending, content in parts:
            with new_file(file_of(stem, ending)) as partial:
                # tofile would lose the errno of a full disk
                partial.write_bytes(content.tobytes())
    scratch.unlink(missing_ok=True)


def _finish(
    config: CacheConfig,
    dataset: Dataset,
    files: list[Layout],
    listed: dict[str, list[dict[str, Any]]],
) -> None:
    """Remove temporary files, write the manifest, and mark the cache as finished."""
    folder = config.output_dir
    plan = read_json(folder / PLAN)
    assert isinstance(plan, dict)
    rows = [row for of_split in listed.values() for row in of_split]
    stems = [row["file"].removesuffix(suffix(ENTRIES)) for row in rows]
    kept = {f"{stem}{ending}" for stem in stems for layout in files for ending in layout.suffixes}
    for file in folder.glob("*/*"):
        if file.is_file() and file.relative_to(folder).as_posix() not in kept:
            file.unlink()
    covered = 0
    entries = next(layout for layout in files if layout.array == ENTRIES)
    for stem in stems:
        covered += int(np.count_nonzero(entries.fixed_parts(folder / stem)["flags"] & VALID))
    content = {
        "format": plan["format"],
        "settings": plan["settings"],
        "arrays": sorted(layout.array for layout in files),
        "shards": listed,
        "dataset_path": str(config.data_path),
        "alignment": plan.get("alignment", {"kind": "same"})
        | {
            "targets": sum(dataset.manifest["splits"][name]["targets"] for name in listed),
            "covered": covered,
        },
    }
    if HIDDEN_STATES in plan:
        content[HIDDEN_STATES] = plan[HIDDEN_STATES]
    write_manifest(folder, KIND, VERSION, to_dict(config), plan["inputs"], skip=(PLAN,), **content)
    (folder / PLAN).unlink()


def _summarise(cache: Cache, seconds: float) -> CacheResult:
    kind, alignment = kind_of(cache), cache.manifest["alignment"]
    shards = [shard for split in kind.splits().values() for shard in split.fixed_parts]
    positions = known = 0
    nats = tail = 0.0
    for shard in shards:
        valid = shard[(shard["flags"] & VALID) != 0]
        labels = known_log_labels(valid)
        positions, known = positions + len(valid), known + len(labels)
        nats -= float(labels.sum())
        tail += float(kind.tail_masses(valid).sum(dtype=np.float64))
    hidden_state_positions = hidden_state_bytes = 0
    if HIDDEN_STATES in cache.manifest:
        arrays = [CachedHiddenStates(cache, name) for name in cache.manifest["shards"]]
        hidden_state_positions = sum(array.count() for array in arrays)
        hidden_state_bytes = arrays[0].layout.dtype.itemsize
    return CacheResult(
        folder=cache.folder,
        positions=positions,
        stream_bytes=cache.entry_bytes,
        teacher_nats=nats / max(known, 1),
        tail_mass=tail / max(positions, 1),
        stored=cache.positions,
        seconds=seconds,
        hidden_state_positions=hidden_state_positions,
        hidden_state_bytes=hidden_state_bytes,
        alignment=alignment["kind"],
        share=alignment["covered"] / max(alignment["targets"], 1),
    )
