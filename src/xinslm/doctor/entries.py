"""A cache against the data it is of, and against the teacher, asked again.

An entry holds log p of the label and the teacher's most likely tokens: if the label is one of them,
both must agree. Entries that are shifted by a position agree with the
wrong tokens. The same is asked of the teacher's answers of today: they must be the cached ones, and
fit no neighbouring entry better.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xinslm.alignment.byte_prefix import BytePrefixAligner
from xinslm.alignment.choose import choose_alignment
from xinslm.baseline import mix_advice, uninformed
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import (
    ENTRIES,
    FP16_FLOOR,
    LARGEST_NEGATIVE_LOG,
    VALID,
    decode,
    tail_masses,
)
from xinslm.cache.folder import Cache
from xinslm.cache.quality import sample, teacher_nats
from xinslm.cache.scorers import DenseScorer
from xinslm.data.dataset import Dataset, Split
from xinslm.data.packing import PackedDataset
from xinslm.data.unigram import unigram_nats
from xinslm.doctor.checks import Examination, Skipped, require
from xinslm.doctor.rows import hidden_states
from xinslm.errors import XinslmError
from xinslm.losses.targets import SparseTargets
from xinslm.model.transformer import Transformer

AGREEING, WINNING, COVERED = 0.9, 1.5, 0.5
OVERLAP, NATS = 0.95, 0.1
SAME_SAMPLES = 0.5
"""Least share of the tail samples that a teacher draws again; rounding moves a few."""
MOST_DECODED = 1 << 17
STUDENT_ROWS = 8
CODE_STEP = math.sqrt(LARGEST_NEGATIVE_LOG) / 255


def check_entries(examination: Examination, cache: Cache, dataset: Dataset) -> None:
    """Checks that need no teacher."""
    split, entries = dataset.split("train"), cache.split("train")
    assert entries is not None, "every dataset has a train split"
    positions = sample(len(split.tokens) - 1)
    stored = entries.fixed(positions)
    few = positions[:: -(-len(positions) // MOST_DECODED)]
    counts = np.asarray(split.mask[positions + 1]) != 0
    valid = (stored["flags"] & VALID) != 0
    examination.make("entries", lambda: _sound(stored, valid, counts))
    examination.make("alignment", lambda: _alignment(cache, split, entries.entries(few), few))
    examination.make("tail", lambda: _tail(cache, stored[valid]))

    examination.make("teacher on this data", lambda: teacher_quality(teacher_nats(cache), dataset))


def _sound(stored: np.ndarray, valid: np.ndarray, counts: np.ndarray) -> str:
    """Numbers are finite, and most targets have an entry."""
    numbers = (stored[name][valid] for name in ("log_tail", "log_label", "log_z"))
    bad = sum(int((~np.isfinite(values)).sum()) for values in numbers)
    share = float(valid[counts].mean()) if counts.any() else 0.0
    return require(
        bad == 0 and share >= COVERED,
        f"{bad} numbers are not finite; {share:.1%} of the targets have an entry (at least "
        f"{COVERED:.0%})",
        "Make the cache again with `xinslm cache --force`",
    )


def _alignment(cache: Cache, split: Split, stored: np.ndarray, positions: np.ndarray) -> str:
    """Entries agree with the tokens that follow them, and with no others."""
    valid = (stored["flags"] & VALID) != 0
    if not valid.any():
        raise Skipped("no position is covered")
    targets = decode(stored[valid], cache.format)
    here, log_label = positions[valid] + 1, stored["log_label"][valid].astype(np.float64)
    hits, agreeing = {}, 0.0
    for shift in (-1, 0, 1):
        tokens = split.tokens[np.clip(here + shift, 0, len(split.tokens) - 1)].astype(np.int64)
        in_top_k = targets.top_k_ids.numpy() == tokens[:, None]
        found = in_top_k.any(axis=1)
        log_p = targets.top_k_log_probs.numpy()[np.arange(len(tokens)), in_top_k.argmax(axis=1)]
        slack = 0.02 + 1.5 * CODE_STEP * np.sqrt(np.maximum(-log_p, 0))
        agrees = found & (np.abs(log_p - log_label) <= slack)
        hits[shift] = float(agrees.mean())
        if shift == 0 and found.any():
            agreeing = float(agrees.sum() / found.sum())
    merged = "merge_depth" in cache.manifest["inputs"]
    detail = (
        f"entries agree with {agreeing:.1%} of the tokens that they list"
        + ("" if merged else f" (at least {AGREEING:.0%})")
        + f"; with {hits[0]:.1%} of all, one position off with {max(hits[-1], hits[1]):.1%}"
    )
    return require(
        (merged or agreeing >= AGREEING) and hits[0] > WINNING * max(hits[-1], hits[1]),
        detail,
        "The cache belongs to other tokens, or its entries are shifted: make it again from this "
        "dataset",
    )


def _tail(cache: Cache, stored: np.ndarray) -> str:
    """The teacher's mass outside the top k, and whether tail samples represent it."""
    mass = float(tail_masses(stored).mean(dtype=np.float64)) if len(stored) else 0.0
    samples = float(stored["num_samples"].mean(dtype=np.float64)) if len(stored) else 0.0
    detail = (
        f"{mass:.1%} of the teacher's mass outside {cache.format.top_k} tokens, {samples:.1f} tail "
        "samples a position"
    )
    return require(
        mass <= 0.3 or cache.format.tail_sample_mass > 0,
        detail,
        "Cache with a larger --top-k, or with tail samples (--tail-sample-mass 0.02)",
    )


def teacher_quality(nats: float | None, dataset: Dataset) -> str:
    """The teacher predicts the train split better than token frequencies alone."""
    if nats is None:
        raise Skipped("no position is covered")
    baseline = unigram_nats(dataset, "train")
    if warning := uninformed("the teacher", nats, baseline, "nats per target token"):
        raise XinslmError(warning)
    facts = dataset.manifest["splits"]["train"]
    bits = nats / math.log(2) * facts["targets"] / max(facts["bytes"], 1)
    return (
        f"{nats:.3f} nats per target token, {bits:.3f} bits per byte; token frequencies alone "
        f"{baseline or math.nan:.3f}"
    )


@torch.no_grad()
def student_quality(model: Transformer, dataset: Dataset, cache: Cache, length: int) -> str:
    """Loss of the student and of the cache's teacher on the same held-out targets."""
    name = "validation" if cache.split("validation") is not None else "train"
    split = cache.split(name)
    rows = PackedDataset(dataset.split(name), length)
    batch = rows.batch(np.arange(min(len(rows), STUDENT_ROWS)))
    chosen = np.flatnonzero(batch.labels.ravel() >= 0)
    if split is None or not len(chosen):
        raise Skipped("no target is held out")
    entries = split.entries(batch.stream.ravel()[chosen])
    known = (entries["flags"] & VALID != 0) & (entries["log_label"] > FP16_FLOOR)
    if not known.any():
        raise Skipped("the teacher's probabilities of the text are not known")
    states = hidden_states(model, batch).flatten(0, 1)[torch.from_numpy(chosen[known])]
    labels = torch.from_numpy(batch.labels.ravel()[chosen[known]]).to(states.device)
    total = sum(
        F.cross_entropy(model.logits(part).float(), wanted, reduction="sum").item()
        for part, wanted in zip(states.split(256), labels.split(256), strict=True)
    )
    student = total / len(labels)
    teacher = -float(entries["log_label"][known].astype(np.float64).mean())
    unit = "nats per target token"
    detail = (
        f"student {student:.3f}, teacher {teacher:.3f} {unit} on {len(labels):,} {name} targets"
    )
    advice = mix_advice(student, teacher, unit)
    return detail if advice is None else f"{detail}\n{advice}"


def ask_again(
    teacher: Any, dataset: Dataset, settings: dict[str, Any], fmt: Any, documents: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Score a few train documents with a cache's settings; return covered positions, entries."""
    from xinslm.cache.support import read_support

    split = dataset.split("train")
    usable = np.flatnonzero(np.diff(split.documents) > 1)
    chosen = np.random.default_rng(seed).choice(usable, min(documents, len(usable)), replace=False)
    config = CacheConfig(
        teacher.name,
        dataset.folder,
        Path(),
        top_k=fmt.top_k,
        tail_sample_mass=fmt.tail_sample_mass,
        temperature=fmt.temperature,
        max_seq_length=min(settings["max_seq_length"], teacher.max_length),
        seed=settings["seed"],
    )
    projection = choose_alignment(dataset, teacher, settings.get("alignment", "auto"))
    if isinstance(projection, BytePrefixAligner):
        raise Skipped("the cache holds no distributions over single tokens")
    scorer = DenseScorer(teacher, projection, fmt, config, None, read_support(dataset))
    parts, places = [], []
    for document in np.sort(chosen):
        first, last = int(split.documents[document]), int(split.documents[document + 1])
        number = int(document)
        entries = scorer.shard(split, number, number + 1, None, lambda tokens: None)[ENTRIES]
        parts.append(entries)
        places.append(np.arange(first, last))
    entries, positions = np.concatenate(parts), np.concatenate(places)
    valid = (entries["flags"] & VALID) != 0
    return positions[valid], entries[valid]


def agreement(cache: Cache, positions: np.ndarray, fresh: np.ndarray) -> str:
    """The teacher's answers of today are the cached ones, in place."""
    split = cache.split("train")
    assert split is not None, "every dataset has a train split"
    now = decode(fresh, cache.format)
    last = len(split) - 1
    overlaps, nats, drawn = {}, math.inf, 1.0
    for shift in (-1, 0, 1):
        stored = split.entries(np.clip(positions + shift, 0, last))
        both = (stored["flags"] & VALID) != 0
        if not both.any():
            raise Skipped("the cache has no entry of these documents")
        overlaps[shift] = _overlap(now[torch.from_numpy(both)], decode(stored[both], cache.format))
        if shift == 0:
            drawn = _same_samples(stored[both], fresh[both])
            labels = [entries["log_label"][both].astype(np.float64) for entries in (stored, fresh)]
            nats = float(np.abs(labels[0] - labels[1]).mean())
    shifted = max((overlaps[shift], shift) for shift in (-1, 1))
    detail = (
        f"{overlaps[0]:.1%} of the teacher's likeliest tokens are as cached (at least "
        f"{OVERLAP:.0%}), one position off "
        f"{shifted[0]:.1%}; log p of the text differs by {nats:.4f} nats (at most {NATS:g})"
    )
    advice = "Another teacher, revision, adapter or dtype made the cache: cache this teacher again"
    if shifted[0] > overlaps[0]:
        advice = f"The entries are shifted by {shifted[1]:+d}: make the cache again"
    agrees = overlaps[0] >= OVERLAP and nats <= NATS and overlaps[0] > shifted[0]
    if agrees and drawn < SAME_SAMPLES:
        detail = f"{drawn:.1%} of the tail samples are as cached (at least {SAME_SAMPLES:.0%})"
        advice = "The file of tail samples belongs to other entries: make the cache again"
        agrees = False
    return require(agrees, detail, advice)


def _same_samples(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the tail samples that two entries of a position have in common."""
    counts = np.minimum(a["num_samples"], b["num_samples"])
    same = (a["num_samples"] == b["num_samples"]) & (counts > 0)
    if not same.any():
        return 1.0
    counted = np.arange(a["tail_ids"].shape[1]) < counts[same][:, None]
    return float((a["tail_ids"][same] == b["tail_ids"][same])[counted].mean())


def _overlap(a: SparseTargets, b: SparseTargets) -> float:
    """Mass that two top ks have in common, as a share of the first's."""
    same = a.top_k_ids[:, :, None] == b.top_k_ids[:, None, :]  # (N, h, h)
    p, q = a.top_k_log_probs.exp(), b.top_k_log_probs.exp()
    common = (torch.minimum(p[:, :, None], q[:, None, :]) * same).sum()
    return float(common / p.sum())
