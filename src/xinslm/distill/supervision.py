"""The supervision of a run: a cache, a live teacher or an encoder's projected hidden states."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xinslm.baseline import uninformed
from xinslm.cache.folder import HIDDEN_STATES, Cache
from xinslm.cache.kinds import CachedTargets, MixedCaches, kind_of
from xinslm.cache.quality import teacher_warning
from xinslm.data.dataset import Dataset
from xinslm.data.packing import PackedDataset
from xinslm.data.unigram import unigram_nats
from xinslm.distill.auxiliary import auxiliary_maker, find_hidden_source
from xinslm.distill.config import DistillConfig
from xinslm.distill.target_sources import LiveTargets
from xinslm.errors import UsageError
from xinslm.files import manifest_fingerprint
from xinslm.losses.targets import DenseTargets
from xinslm.model.files import require_context
from xinslm.progress import Listener
from xinslm.teachers.encoder import find_encoder
from xinslm.teachers.endpoint import is_endpoint
from xinslm.teachers.open import TeacherOptions, open_teacher, teacher_fingerprint
from xinslm.train.config import PretrainConfig
from xinslm.train.interfaces import Supervision, TargetSource

_SAMPLED_ROWS, _CHUNK = 8, 512


def find_supervision(
    config: PretrainConfig, dataset: Dataset, device: torch.device, on_progress: Listener
) -> Supervision:
    """What `config` learns from: a cache or a live teacher.

    Raises UsageError if teacher, cache, dataset and loss do not fit each other.
    """
    assert isinstance(config, DistillConfig)
    if config.cache is None:
        return _live(config, dataset, device)
    return _cached(config, dataset, (config.cache, *config.more_caches), on_progress)


def _live(config: DistillConfig, dataset: Dataset, device: torch.device) -> Supervision:
    assert config.teacher is not None, "DistillConfig.check sees to it"
    if find_encoder(config.teacher) is not None:
        raise UsageError(
            f"{config.teacher} is an encoder: it gives hidden states, no next tokens. Make a "
            "cache of them, with "
            f"`xinslm cache {config.teacher} --hidden-state-depths 1.0`, and give that as --cache"
        )
    if is_endpoint(config.teacher):
        raise UsageError(
            "an endpoint cannot teach step by step: make a cache with `xinslm cache "
            f"{config.teacher}`, or let it "
            f"write with `xinslm synthesize`, and give that as --cache"
        )
    options = TeacherOptions(
        dtype=config.teacher_dtype, device=device, trust_remote_code=config.trust_remote_code
    )
    teacher: Any = open_teacher(config.teacher, options)
    if teacher.tokenizer.fingerprint() != dataset.tokenizer_fingerprint:
        raise UsageError(
            f"a live teacher must share the dataset's tokenizer, and {config.teacher}'s differs "
            "from the one of "
            f"{dataset.folder}. Prepare the data with the teacher's, or use `xinslm cache`, which "
            "maps nested ones"
        )
    require_context(config.max_seq_length, teacher.max_length, f"teacher {config.teacher}")
    source = LiveTargets(teacher, config.hidden_depths())
    hidden, inputs = find_hidden_source(config, dataset, source)
    auxiliary = auxiliary_maker(config, hidden)
    inputs = (("teacher", teacher.fingerprint), *inputs)
    warning = uninformed(
        source.name,
        _sampled_nats(source, dataset, config.max_seq_length, device),
        unigram_nats(dataset, "train"),
        "nats per target token",
    )
    warnings = (warning,) if warning else ()
    return Supervision(config.loss, source, source, auxiliary, inputs, warnings)


def _sampled_nats(
    source: TargetSource, dataset: Dataset, length: int, device: torch.device
) -> float | None:
    """A live teacher's nats per target token on a few rows spread over the train split."""
    rows = PackedDataset(dataset.split("train"), length)
    batch = rows.batch(np.unique(np.linspace(0, len(rows) - 1, _SAMPLED_ROWS).astype(np.int64)))
    labels = torch.from_numpy(batch.labels.ravel())
    chosen = np.flatnonzero(labels >= 0)
    if not len(chosen):
        return None
    targets = source.targets(batch, chosen, device)
    assert isinstance(targets, DenseTargets), "a live teacher gives all logits"
    total = 0.0
    for at in range(0, len(chosen), _CHUNK):
        logits = targets.logits(slice(at, at + _CHUNK))
        wanted = labels[chosen[at : at + _CHUNK]].to(logits.device)
        total += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
    return total / len(chosen)


def _cached(
    config: DistillConfig, dataset: Dataset, folders: Sequence[Path], on_progress: Listener
) -> Supervision:
    caches = [Cache(folder) for folder in folders]
    for cache in caches:
        cache.require_dataset(dataset.fingerprint, dataset.folder)
        cache.verify(on_progress)
    if config.teacher is not None:
        caches[0].require_teacher(_teachers_fingerprint(config.teacher), config.teacher)
    hidden, inputs = find_hidden_source(config, dataset, caches[0])
    names = ["cache", *(f"cache_{number}" for number in range(2, len(caches) + 1))]
    inputs = (*zip(names, map(manifest_fingerprint, folders), strict=True), *inputs)
    auxiliary = auxiliary_maker(config, hidden)
    if any(_is_of_encoder(cache) for cache in caches):
        warnings = _encoder_warnings(config, caches, hidden)
        return Supervision(
            config.loss, make_auxiliary_loss=auxiliary, inputs=inputs, warnings=warnings
        )
    for cache in caches:
        kind_of(cache).check_loss(config.loss)
    sources = [kind_of(cache).sources(dataset.folder / "tokenizer") for cache in caches]
    for cache, found in zip(caches, sources, strict=True):
        if "train" not in found:
            raise UsageError(
                f"cache {cache.folder} has no entries of the split 'train'; make it again"
            )
    return Supervision(
        config.loss,
        _mixed(sources, "train", config.cache_weights),
        _mixed(sources, "validation", config.cache_weights),
        auxiliary,
        inputs,
        tuple(text for cache in caches for text in _cache_warnings(config, dataset, cache)),
    )


def _mixed(
    sources: Sequence[Mapping[str, CachedTargets]], split: str, weights: Sequence[float]
) -> TargetSource | None:
    """Targets of a split, from one cache or from all; None unless each has entries of it."""
    there = [of_cache[split] for of_cache in sources if split in of_cache]
    if len(there) < len(sources):
        return None
    return there[0] if len(there) == 1 else MixedCaches(there, weights or (1.0,) * len(there))


def _is_of_encoder(cache: Cache) -> bool:
    return bool(cache.manifest.get(HIDDEN_STATES, {}).get("alone"))


def _encoder_warnings(
    config: DistillConfig, caches: Sequence[Cache], hidden: object
) -> tuple[str, ...]:
    """Warnings for a cache that holds hidden states only; UsageError if they are not used."""
    folder = next(cache.folder for cache in caches if _is_of_encoder(cache))
    if len(caches) > 1:
        raise UsageError(
            f"cache {folder} is of an encoder and holds hidden states only, which do not mix with "
            "other caches: pass it as --hidden-states"
        )
    if hidden is None:
        raise UsageError(
            f"cache {folder} is of an encoder and holds hidden states only, but hidden.weight "
            "and contrast.weight are 0: set one (--hidden.weight 1), or pass the cache of a "
            "language model as --cache and this one as --hidden-states"
        )
    beta = config.loss.beta
    note = (
        f"cache {folder} predicts no tokens: the weight loss.beta ({beta}) goes to the "
        "cross-entropy"
    )
    return (note,) if beta else ()


def _cache_warnings(config: DistillConfig, dataset: Dataset, cache: Cache) -> tuple[str, ...]:
    warnings = []
    if warning := teacher_warning(cache, dataset):
        warnings.append(warning)
    cached_length = cache.manifest["config"]["max_seq_length"]
    if cached_length != config.max_seq_length:
        warnings.append(
            f"the teacher of {cache.folder} saw contexts of {cached_length} tokens, the student "
            f"sees {config.max_seq_length}"
        )
    return tuple(warnings)


def _teachers_fingerprint(name: str) -> str:
    """Fingerprint that a cache of this teacher would carry, without loading it where that can be
    avoided.
    """
    if is_endpoint(name):
        raise UsageError(
            f"--teacher with --cache compares weights, and {name} has none: leave it out"
        )
    return teacher_fingerprint(name)
