"""The stage `cache merge`: the caches of several teachers into one cache of their weighted mixture.

    xinslm cache merge cache/a cache/b cache/c --output-dir cache/all --weights 0.5 0.3 0.2

sum_k w_k KL(p_k || q) is KL(sum_k w_k p_k || q) up to a constant that no student can change, so
training from the merged cache costs what training from one teacher costs. An entry is the teacher
in expectation over its tail samples; the weighted sum of entries, drawn from again (`mixture.py`),
is the mixture in expectation. The normaliser at a temperature does not follow from entries: a
merged cache has the one for temperature 1, so losses with temperature_mode full at another
temperature are refused. Projected hidden states are not merged.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import ENTRIES, CacheFormat, decode, pack_entries, position_uniforms
from xinslm.cache.folder import HIDDEN_STATES, Cache, CacheSplit
from xinslm.cache.merge_config import MergeConfig
from xinslm.cache.merge_weights import document_weights
from xinslm.cache.mixture import Masses, mix
from xinslm.cache.write import PLACES, CacheResult, write_cache
from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, Split, open_dataset
from xinslm.errors import UsageError
from xinslm.files import manifest_fingerprint, sha256_json
from xinslm.folders import refuse_inside
from xinslm.progress import Listener, Progress, ignore

BLOCK = 1 << 12
"""Positions merged at a time."""


def run(config: MergeConfig, on_progress: Listener = ignore) -> CacheResult:
    """Merge caches of one dataset.

    Raises UsageError for caches that do not fit each other or the dataset, and for an output folder
    that holds something else; XinslmError for a damaged cache.
    """
    config.check()
    caches = [Cache(folder) for folder in config.caches]
    data_path = config.data_path or Path(caches[0].manifest["dataset_path"])
    if config.data_path is None and not data_path.exists():
        raise UsageError(
            f"the dataset of cache {caches[0].folder} is not at {data_path} any "
            "more: pass --data-path"
        )
    dataset = open_dataset(data_path)
    _require_fit(caches, dataset, on_progress)
    fmt = _format(config, caches)
    lengths = {cache.manifest["config"]["max_seq_length"] for cache in caches}
    if len(lengths) > 1:
        listed = ", ".join(f"{length}" for length in sorted(lengths))
        note = f"the teachers saw contexts of different lengths: {listed} tokens"
        on_progress(Progress("merge", note=note))
    weights = {
        name: document_weights(config.weights, config.domain_weights, len(caches), dataset, name)
        for name in dataset.manifest["splits"]
    }
    depth = 1 + max(int(cache.manifest["inputs"].get("merge_depth", "0")) for cache in caches)
    stream = _stream(config.seed, depth)
    scorer = MergeScorer(caches, weights, config.token_temperature, fmt, stream)
    target = CacheConfig(
        teacher=_describe(config),
        data_path=dataset.folder,
        output_dir=config.output_dir,
        top_k=fmt.top_k,
        tail_sample_mass=fmt.tail_sample_mass,
        temperature=fmt.temperature,
        max_seq_length=min(lengths),
        shard_positions=config.shard_positions,
        seed=config.seed,
        repair=config.repair,
        force=config.force,
    )
    if config.force:
        refuse_inside(config.output_dir, config.caches)
    plan = _plan(config, dataset, caches, weights, scorer, depth)
    return write_cache(target, dataset, plan, scorer, on_progress)


def _stream(seed: int, depth: int) -> int:
    """Seed of the uniform numbers, another one than of any cache that is merged."""
    digest = hashlib.sha256(f"merge {depth} {seed}".encode()).digest()
    return (1 << 31) | int.from_bytes(digest[:4], "little") >> 1


def _require_fit(caches: list[Cache], dataset: Dataset, on_progress: Listener) -> None:
    """Raise UsageError unless all caches fit the dataset, XinslmError if one is damaged."""
    for cache in caches:
        cache.require_dataset(dataset.fingerprint, dataset.folder)
        cache.verify(on_progress)
        if not cache.over_tokens:
            raise UsageError(
                f"cache {cache.folder} holds masses of buckets of tokens (--alignment "
                "byte_prefix), which do not merge: give it to `xinslm distill --more-caches`, "
                "which learns from several caches at once"
            )
        strange = set(cache.manifest.get("arrays", [ENTRIES])) - {ENTRIES, HIDDEN_STATES}
        if strange or cache.manifest.get(HIDDEN_STATES, {}).get("alone"):
            what = ", ".join(sorted(strange)) or "hidden states alone"
            raise UsageError(
                f"cache {cache.folder} holds {what}: only distributions of the next "
                "token can be merged"
            )
        if cache.format.vocab_size != dataset.manifest["vocab_size"]:
            raise UsageError(
                f"cache {cache.folder} has {cache.format.vocab_size:,} token ids, dataset "
                f"{dataset.folder} {dataset.manifest['vocab_size']:,}: they do not belong together"
            )
        for name in dataset.manifest["splits"]:
            if cache.split(name) is None and len(dataset.split(name).tokens):
                raise UsageError(
                    f"cache {cache.folder} has no entries of the split '{name}'; make it again"
                )


def _format(config: MergeConfig, caches: list[Cache]) -> CacheFormat:
    smallest = min(cache.format.top_k for cache in caches)
    top_k = smallest if config.top_k is None else config.top_k
    if top_k > smallest:
        folder = next(cache.folder for cache in caches if cache.format.top_k == smallest)
        raise UsageError(
            f"top_k is {top_k}, but cache {folder} knows only {smallest} tokens at each position "
            f"exactly: pass --top-k {smallest} or less"
        )
    sample_mass = config.tail_sample_mass
    if sample_mass is None:
        masses = (cache.format.tail_sample_mass for cache in caches)
        sample_mass = min((mass for mass in masses if mass), default=0.0)
    return CacheFormat(caches[0].format.vocab_size, top_k, sample_mass, 1.0)


def _describe(config: MergeConfig) -> str:
    weights = config.weights or (1.0,) * len(config.caches)
    parts = zip(weights, config.caches, strict=True)
    shares = " + ".join(f"{w / sum(weights):.4g} x {cache}" for w, cache in parts)
    by_domain = f", by source with {config.domain_weights}" if config.domain_weights else ""
    tau = config.token_temperature
    by_token = f", by token with tau {tau:g}" if tau else ""
    return f"merge of {shares}{by_domain}{by_token}"


def _plan(
    config: MergeConfig,
    dataset: Dataset,
    caches: list[Cache],
    weights: dict[str, np.ndarray],
    scorer: "MergeScorer",
    depth: int,
) -> dict[str, Any]:
    inputs = ("caches", "weights", "domain_weights")
    settings = {k: v for k, v in to_dict(config).items() if k not in (*PLACES, *inputs)}
    settings["weights"] = {
        name: hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()
        for name, table in weights.items()
    }
    teachers = [cache.manifest["inputs"]["teacher"] for cache in caches]
    tokenizers = sorted({cache.manifest["inputs"]["teacher_tokenizer"] for cache in caches})
    return {
        "format": asdict(scorer.format),
        "settings": settings,
        "arrays": {name: item.itemsize for name, item in scorer.arrays.items()},
        "inputs": {
            "dataset": dataset.fingerprint,
            "tokenizer": dataset.tokenizer_fingerprint,
            "teacher": sha256_json([teachers, settings["weights"], config.token_temperature]),
            "teacher_tokenizer": tokenizers[0] if len(tokenizers) == 1 else sha256_json(tokenizers),
            "merge_depth": str(depth),
            **{f"cache_{n}": manifest_fingerprint(cache.folder) for n, cache in enumerate(caches)},
        },
    }


class MergeScorer:
    """Gives the mixture of caches for runs of documents, as a `Scorer`."""

    def __init__(
        self,
        caches: list[Cache],
        weights: dict[str, np.ndarray],
        token_temperature: float | None,
        fmt: CacheFormat,
        stream: int,
    ) -> None:
        self.caches, self.weights, self.format = caches, weights, fmt
        self.token_temperature, self.stream = token_temperature, stream
        self.arrays = {ENTRIES: fmt.dtype}
        self._opened: dict[tuple[Path, str], CacheSplit | None] = {}

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, report: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Mix the entries of documents `first` to `last`; uncovered positions keep flag 0."""
        start, end = int(split.documents[first]), int(split.documents[last])
        out = np.zeros(end - start, dtype=self.format.dtype)
        opened = [(self._split(cache, split.name), cache.format) for cache in self.caches]
        for low in range(start, end, BLOCK):
            positions = np.arange(low, min(low + BLOCK, end))
            document = np.searchsorted(split.documents, positions, side="right") - 1
            stored = [(s.entries(positions), fmt) for s, fmt in opened if s is not None]
            self._mix(stored, self.weights[split.name][document], positions, out[low - start :])
            report(int(positions[-1]) + 1 - start)
        return {ENTRIES: out}

    def _split(self, cache: Cache, name: str) -> CacheSplit | None:
        """A split of a cache, opened once for all shards."""
        key = cache.folder, name
        if key not in self._opened:
            self._opened[key] = cache.split(name)
        return self._opened[key]

    def _mix(
        self,
        stored: list[tuple[np.ndarray, CacheFormat]],
        prior: np.ndarray,
        positions: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Write the mixture of some positions' entries into the first places of `out`."""
        decoded = [decode(entries, fmt) for entries, fmt in stored]
        valid = np.stack([targets.valid_mask.numpy() for targets in decoded], axis=1)
        log_label = np.stack([x["log_label"].astype(np.float64) for x, _ in stored], axis=1)
        weights = _position_weights(prior * valid, log_label, self.token_temperature)
        rows = np.flatnonzero(weights.sum(axis=1) > 0)
        weights = weights[rows]
        parts = [
            Masses(
                targets.top_k_ids.numpy()[rows],
                weights[:, [k]] * np.exp(targets.top_k_log_probs.numpy()[rows].astype(np.float64)),
                weights[:, k] * np.exp(targets.log_tail.numpy()[rows].astype(np.float64)),
                targets.tail_ids.numpy()[rows],
                targets.num_samples.numpy()[rows],
            )
            for k, targets in enumerate(decoded)
        ]
        uniforms = position_uniforms(torch.from_numpy(positions[rows]), self.stream).numpy()
        fmt = self.format
        mixture = mix(parts, uniforms, fmt.top_k, fmt.tail_sample_mass)
        with np.errstate(divide="ignore"):
            likelihood = np.log(weights) + log_label[rows]
        out[rows] = pack_entries(
            torch.from_numpy(mixture.top_k_ids),
            torch.from_numpy(mixture.top_k_mass),
            torch.from_numpy(mixture.tail),
            torch.from_numpy(mixture.tail_ids),
            torch.from_numpy(mixture.num_samples),
            torch.zeros(len(rows)),
            torch.from_numpy(np.logaddexp.reduce(likelihood, axis=1)),
            fmt,
        )


def _position_weights(prior: np.ndarray, log_label: np.ndarray, tau: float | None) -> np.ndarray:
    """Weights (N, caches) that sum to 1 or 0; with tau, prior * p(label)^(1/tau)."""
    counts = prior > 0
    if tau is not None:
        score = np.where(counts, log_label / tau, -np.inf)
        top = score.max(axis=1, keepdims=True)
        prior = prior * np.exp(score - np.where(np.isfinite(top), top, 0.0))
    total = prior.sum(axis=1, keepdims=True)
    weights: np.ndarray = prior / np.where(total > 0, total, 1.0)
    return weights
