"""The stage `doctor`: checks everything that a long run depends on, with its models and data.

    xinslm doctor --data-path data --cache cache --teacher TEACHER --student runs/student

Each check reports a measurement and its threshold; checks that are not possible are skipped, with
the reason. Files are hashed, ids compared by their bytes, entries compared with the tokens that
came and with the teacher, asked again; the fused loss is compared with dense autograd, and packing,
pads and micro-batches with doing without.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xinslm.cache.entries import ENTRIES, CacheFormat, decode, encode
from xinslm.cache.folder import HIDDEN_STATES, Cache
from xinslm.data.dataset import Dataset, open_dataset
from xinslm.data.packing import Batch, PackedDataset
from xinslm.device import pick_device
from xinslm.doctor.checks import Check, Examination, Skipped, require
from xinslm.doctor.config import DoctorConfig
from xinslm.doctor.entries import (
    agreement,
    ask_again,
    check_entries,
    student_quality,
    teacher_quality,
)
from xinslm.doctor.losses import Positions, check_losses
from xinslm.doctor.rows import check_rows, hidden_states
from xinslm.doctor.vocabulary import dataset_vocabulary, same_vocabulary, teacher_vocabulary
from xinslm.errors import UsageError, XinslmError
from xinslm.files import damaged_files
from xinslm.losses.targets import SparseTargets
from xinslm.model.config import ModelConfig
from xinslm.model.files import load_model
from xinslm.model.finite import all_finite
from xinslm.model.transformer import Transformer
from xinslm.progress import Listener, ignore
from xinslm.tokenizer.load import load_tokenizer

DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class DoctorResult:
    """All checks, in the order they were made."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if check.status == "FAIL"]

    def describe(self) -> str:
        """A line a check."""
        width = max(len(check.name) for check in self.checks)
        return "\n".join(check.line(width) for check in self.checks)


def run(config: DoctorConfig, on_progress: Listener = ignore) -> DoctorResult:
    """Make all checks that what is given allows; what is wrong is in the result, a wrong request is
    a UsageError.
    """
    config.check()
    dataset = open_dataset(config.data_path, check_hashes=False)
    device = pick_device(config.device)
    examination = Examination(on_progress)
    tokenizer = load_tokenizer(dataset.folder / "tokenizer")
    examination.make("dataset files", lambda: _whole(dataset.folder, dataset.manifest))
    examination.make("dataset vocabulary", lambda: dataset_vocabulary(dataset, tokenizer))
    cache = _check_cache(examination, config, dataset)
    _check_teacher(examination, config, dataset, tokenizer, cache, device)
    _check_student(examination, config, dataset, tokenizer, cache, device)
    return DoctorResult(tuple(examination.checks))


def _whole(folder: Any, manifest: dict[str, Any]) -> str:
    damaged = damaged_files(folder, manifest)
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    detail = f"{len(manifest['files'])} files, {size / 1e6:,.1f} MB: hashes as in the manifest"
    if damaged:
        detail = f"damaged: {', '.join(damaged[:5])}"
    return require(
        not damaged,
        detail,
        "Copy them again, or make the folder again with the command that made it",
    )


def _check_cache(examination: Examination, config: DoctorConfig, dataset: Dataset) -> Cache | None:
    """Check the cache alone; give it where it can be used."""
    of_entries = ("entries", "alignment", "tail", "teacher on this data")
    if config.cache is None:
        examination.skip(("cache files", "cache of this dataset"), "no --cache")
        examination.skip(of_entries if config.teacher is None else of_entries[:-1], "no --cache")
        return None
    opened: list[Cache] = []
    folder = config.cache

    def files() -> str:
        cache = Cache(folder, check_hashes=False)
        opened.append(cache)
        cache.verify()
        size = sum(facts["bytes"] for facts in cache.manifest["files"].values())
        return (
            f"{len(cache.manifest['files'])} files, {size / 1e6:,.1f} MB: hashes as in the manifest"
        )

    def belongs() -> str:
        opened[0].require_dataset(dataset.fingerprint, dataset.folder)
        ids = opened[0].format.vocab_size
        return require(
            ids == dataset.manifest["vocab_size"], f"{ids:,} ids in both", "Make the cache again"
        )

    whole = examination.make("cache files", files)
    if not opened:
        examination.skip(("cache of this dataset", *of_entries), "the cache cannot be opened")
        return None
    if not whole:
        examination.skip(("cache of this dataset", *of_entries), "the cache is damaged")
        return None
    if not examination.make("cache of this dataset", belongs):
        examination.skip(of_entries, "the cache is not of this dataset")
        return None
    arrays = set(opened[0].manifest["arrays"])
    if opened[0].manifest.get(HIDDEN_STATES, {}).get("alone") or arrays - {ENTRIES, HIDDEN_STATES}:
        examination.skip(
            of_entries,
            f"the cache has no distributions of the next token, only {', '.join(arrays)}",
        )
        return None
    if not opened[0].over_tokens:
        kind = opened[0].manifest["alignment"]["kind"]
        examination.skip(
            of_entries, f"the cache holds no distributions over single tokens ({kind})"
        )
        return opened[0]
    check_entries(examination, opened[0], dataset)
    return opened[0]


def _check_teacher(
    examination: Examination,
    config: DoctorConfig,
    dataset: Dataset,
    tokenizer: Any,
    cache: Cache | None,
    device: torch.device,
) -> None:
    names = ("teacher vocabulary", "teacher of this cache", "teacher agreement")
    if config.teacher is None:
        examination.skip(("teacher", *names), "no --teacher")
        return
    from xinslm.teachers.endpoint import is_endpoint
    from xinslm.teachers.open import TeacherOptions, open_teacher

    if is_endpoint(config.teacher):
        raise UsageError(
            f"doctor asks teachers whose files are here, and {config.teacher} is an endpoint. "
            "Leave it out"
        )
    opened: list[Any] = []
    name = config.teacher

    def opens() -> str:
        opened.append(
            open_teacher(
                name,
                TeacherOptions(
                    dtype=config.dtype,
                    device=device,
                    trust_remote_code=config.trust_remote_code,
                    adapter=config.adapter,
                ),
            )
        )
        return f"{name}, {opened[0].vocab_size:,} ids, context {opened[0].max_length:,} tokens"

    if not examination.make("teacher", opens):
        examination.skip(names, "the teacher cannot be loaded")
        return
    teacher = opened[0]
    cached = None if cache is None else cache.manifest["inputs"].get("teacher_tokenizer")
    if not examination.make(names[0], lambda: teacher_vocabulary(tokenizer, teacher, cached)):
        examination.skip(names[1:], "the teacher's ids are not the dataset's")
        return
    if config.cache is None:
        examination.skip(names[1:], "no --cache")
        examination.make("teacher on this data", lambda: _quality(config, dataset, teacher))
    elif cache is None:
        examination.skip(names[1:], "the cache cannot be used")
    elif "merge_depth" in cache.manifest["inputs"]:
        examination.skip(names[1:], "the cache is merged from several teachers")
    else:
        examination.make(names[1], lambda: _made_by(cache, teacher))
        examination.make(names[2], lambda: _agrees(config, dataset, cache, teacher))


def _made_by(cache: Cache, teacher: Any) -> str:
    cache.require_teacher(teacher.fingerprint, teacher.name)
    return f"fingerprint {teacher.fingerprint[:12]}"


def _agrees(config: DoctorConfig, dataset: Dataset, cache: Cache, teacher: Any) -> str:
    settings = cache.manifest["config"] | {"alignment": cache.manifest["alignment"]["kind"]}
    positions, fresh = ask_again(
        teacher, dataset, settings, cache.format, config.documents, config.seed
    )
    return agreement(cache, positions, fresh)


def _quality(config: DoctorConfig, dataset: Dataset, teacher: Any) -> str:
    fmt = CacheFormat(dataset.manifest["vocab_size"], 1, 0, 1.0)
    settings = {"max_seq_length": DEFAULT_LENGTH, "seed": 0}
    positions, fresh = ask_again(teacher, dataset, settings, fmt, config.documents, config.seed)
    if not len(positions):
        raise Skipped("the documents taken have no targets")
    return teacher_quality(-float(fresh["log_label"].astype(np.float64).mean()), dataset)


_OF_STUDENT = (
    "fused cross-entropy",
    "fused distillation",
    "fused distillation, T=2",
    "other divergences",
    "temperature",
    "student as teacher",
    "packing",
    "pads",
    "accumulation",
)


def _check_student(
    examination: Examination,
    config: DoctorConfig,
    dataset: Dataset,
    tokenizer: Any,
    cache: Cache | None,
    device: torch.device,
) -> None:
    model = _sound_student(examination, config, tokenizer)
    if model is None:
        return
    model = model.to(device).eval()
    length = min(
        model.config.max_position_embeddings, DEFAULT_LENGTH if cache is None else _length(cache)
    )
    if config.student is not None and cache is not None and cache.over_tokens:
        examination.make(
            "student on this data", lambda: student_quality(model, dataset, cache, length)
        )
    rows = PackedDataset(dataset.split("train"), length)
    batch = _choose(rows, config.batch_size, config.seed)
    check_losses(examination, _positions(config, model, batch, cache), config.seed)
    check_rows(examination, model, batch)


def _sound_student(
    examination: Examination, config: DoctorConfig, tokenizer: Any
) -> Transformer | None:
    """The student to compute with; None, with the reason noted, if it cannot be used."""
    if config.student is None:
        examination.skip(
            ("student weights",), "no --student: the checks below use a small random one"
        )
        examination.skip(("student vocabulary",), "no --student")
        return _draw_student(tokenizer.vocab_size, config.seed)
    folder, loaded = config.student, list[Transformer]()

    def weights() -> str:
        loaded.append(load_model(folder))
        bad = [name for name, weight in loaded[0].named_parameters() if not all_finite(weight)]
        named = f": {', '.join(bad[:3])}" if bad else ""
        detail = (
            f"{loaded[0].config.num_parameters:,} parameters, {len(bad)} tensors not finite{named}"
        )
        return require(not bad, detail, "Go back to an earlier checkpoint")

    def vocabulary() -> str:
        theirs = load_tokenizer(folder)
        return same_vocabulary(tokenizer, theirs, loaded[0].config.vocab_size, "student")

    sound = examination.make("student weights", weights)
    if not loaded:
        examination.skip(("student vocabulary", *_OF_STUDENT), "the student cannot be loaded")
        return None
    fits = examination.make("student vocabulary", vocabulary)
    if sound and fits:
        return loaded[0]
    reason = "the student is not sound" if not sound else "the student's ids are not the data's"
    examination.skip(_OF_STUDENT, reason)
    return None


def _choose(rows: PackedDataset, count: int, seed: int) -> Batch:
    """Some rows at random, half of them with many documents among those looked at."""
    indices = np.random.default_rng(seed).permutation(len(rows))[: 16 * count]
    order = np.argsort(-rows.batch(indices).segments.max(axis=1), kind="stable")
    return rows.batch(
        indices[np.concatenate((order[: count // 2], order[-(count - count // 2) :]))]
    )


def _length(cache: Cache) -> int:
    return int(cache.manifest["config"]["max_seq_length"])


def _draw_student(vocab_size: int, seed: int) -> Transformer:
    """A small student with weights large enough for distributions that are not flat."""
    model = Transformer(
        ModelConfig(vocab_size, 64, 128, 2, 4, 2, 16, max_position_embeddings=DEFAULT_LENGTH)
    )
    model.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0 if weight.dim() > 1 else 1.0)
    return model


def _positions(
    config: DoctorConfig, model: Transformer, batch: Batch, cache: Cache | None
) -> Positions:
    """The student's hidden states at some targets, with targets of the cache or of a random
    teacher.
    """
    targets = np.flatnonzero(batch.labels.ravel() >= 0)
    if not len(targets):
        raise XinslmError("the rows that were taken hold no target: raise --batch-size")
    chosen = np.sort(np.random.default_rng(config.seed).permutation(targets)[: config.positions])
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        hidden = hidden.reshape(-1, hidden.shape[-1])[
            torch.from_numpy(chosen).to(hidden.device)
        ].float()
    labels = torch.from_numpy(batch.labels.ravel()[chosen])
    sparse: SparseTargets
    split = cache.split("train") if cache is not None and cache.over_tokens else None
    if cache is not None and split is not None:
        entries = split.entries(batch.stream.ravel()[chosen])
        sparse, teacher = decode(entries, cache.format), "the cache's entries"
    else:
        sparse, teacher = (
            _draw_teacher(model.config.vocab_size, labels, config.seed),
            "a random teacher",
        )
    weight = model.head_weight.detach().float()
    return Positions(hidden, weight, labels.to(hidden.device), sparse.to(hidden.device), teacher)


def _draw_teacher(vocab_size: int, labels: torch.Tensor, seed: int) -> SparseTargets:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(len(labels), vocab_size, generator=generator)).softmax(1)
    fmt = CacheFormat(vocab_size, min(8, vocab_size - 1), 0.05, 2.0)
    return decode(encode(probs, labels, torch.arange(len(labels)), fmt, seed), fmt)
