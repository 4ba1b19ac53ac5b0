"""The cache of `xinslm synthesize`: scored by a local teacher, or made from the log-probabilities
that an endpoint returned with its text.

An endpoint's tokens are matched by bytes: positions get entries as long as the server's tokens are
the dataset's. After the first difference the server's log-probabilities belong to another context,
so the rest of the answer has no teacher targets; nor has its end token, of which servers say
nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache import score
from xinslm.cache.config import CacheConfig, default_top_k
from xinslm.cache.endpoint_scorer import endpoint_format, top_k_entries
from xinslm.cache.entries import ENTRIES, CacheFormat
from xinslm.cache.folder import Cache
from xinslm.cache.write import cache_plan, write_cache
from xinslm.data.dataset import Split, open_dataset
from xinslm.files import MANIFEST
from xinslm.progress import Listener
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.rollouts.synthesize_data import Answer
from xinslm.teachers.base import Generation
from xinslm.teachers.endpoint import EndpointTeacher

DATA, CACHE = "data", "cache"
"""Subfolders of the output folder."""


class WrittenScorer:
    """A `Scorer` that reads the log-probabilities stored with the answers; answer i is document
    i.
    """

    def __init__(self, answers: dict[str, list[Answer]], tokenizer: Any, fmt: CacheFormat) -> None:
        self.answers, self.tokenizer, self.format = answers, tokenizer, fmt
        self.arrays = {ENTRIES: fmt.dtype}
        special = set(tokenizer.special_tokens.values())
        # A byte may have a byte token and an ordinary one; the ordinary one has the larger id.
        self.ids = {
            tokenizer.token_bytes(t): t for t in range(tokenizer.vocab_size) if t not in special
        }
        self.ids = {tokenizer.token_bytes(t): t for t in special} | self.ids
        self.ids.pop(b"", None)

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Entries of documents `first` to `last`, those of the dataset's answers."""
        begin = int(split.documents[first])
        entries = np.zeros(int(split.documents[last]) - begin, self.format.dtype)
        for number in range(first, last):
            start, end = (int(x) for x in split.documents[number : number + 2])
            tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
            targets = np.flatnonzero(np.asarray(split.mask[start:end]))
            written = self.answers[split.name][number].written
            places, found = self._match(
                [self.tokenizer.token_bytes(int(t)) for t in tokens[targets]], written
            )
            ids, values, labels, kept = [], [], [], []
            for place, token in zip(places, found, strict=True):
                rivals = self._rivals(written.top[token])
                if len(rivals) == self.format.top_k:
                    ids.append([i for i, _ in rivals])
                    values.append([value for _, value in rivals])
                    labels.append(written.log_probs[token])
                    kept.append(start - begin + int(targets[place]) - 1)
            if kept:
                entries[kept] = top_k_entries(
                    np.array(ids), np.array(values), np.array(labels), self.format
                )
            tell(end - begin)
        return {ENTRIES: entries}

    def _rivals(self, top: Sequence[tuple[bytes, float]]) -> list[tuple[int, float]]:
        """Map the top-k tokens to the tokenizer's ids; unknown ones stay in the tail."""
        ours: dict[int, float] = {}
        for data, value in top:
            token = self.ids.get(data)
            if token is not None:
                ours.setdefault(token, value)
        return list(ours.items())[: self.format.top_k]

    def _match(self, targets: list[bytes], written: Generation) -> tuple[list[int], list[int]]:
        """Pair targets with the server's tokens, from the start of the answer to the first
        difference.
        """
        answer = written.text.encode()
        said = b"".join(written.token_bytes)
        shift = said.rfind(answer)  # reasoning before the answer is not in the text
        if shift < 0 or not written.top:
            return [], []
        while targets and not answer.endswith(targets[-1]):
            # what closes the answer: an end token, a line end of the template's
            targets = targets[:-1]
        begins = np.cumsum([0, *map(len, written.token_bytes)]) - shift
        first = np.flatnonzero(begins[:-1] == len(answer) - sum(map(len, targets)))
        if not len(first):
            return [], []
        said_tokens = written.token_bytes[int(first[-1]) :]
        same = next(
            (
                n
                for n, pair in enumerate(zip(targets, said_tokens, strict=False))
                if pair[0] != pair[1]
            ),
            None,
        )
        count = min(len(targets), len(said_tokens)) if same is None else same
        places = [place for place in range(count) if written.top[int(first[-1]) + place]]
        return places, [int(first[-1]) + place for place in places]


def _cache_config(config: SynthesizeConfig) -> CacheConfig:
    return CacheConfig(
        teacher=config.teacher,
        data_path=config.output_dir / DATA,
        output_dir=config.output_dir / CACHE,
        top_k=config.top_k,
        tail_sample_mass=config.tail_sample_mass,
        temperature=config.cache_temperature,
        max_seq_length=config.max_seq_length,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        teacher_tokenizer_path=config.teacher_tokenizer_path,
        endpoint=config.endpoint,
        seed=config.seed,
    )


def score_answers(config: SynthesizeConfig, on_progress: Listener) -> str:
    """Let the teacher score the dataset of its answers; return what the cache holds."""
    if not (config.output_dir / CACHE / MANIFEST).is_file():
        score.run(_cache_config(config), on_progress)
    cache = Cache(config.output_dir / CACHE)
    size = cache.entry_bytes / cache.positions
    return f"{cache.folder}, scored by the teacher; {size:.1f} bytes a position"


def cache_log_probs(
    config: SynthesizeConfig,
    teacher: EndpointTeacher,
    tokenizer: Any,
    splits: dict[str, list[Answer]],
    on_progress: Listener,
) -> str:
    """Make the cache from the log-probabilities that came with the answers, if the endpoint's
    tokens are the dataset's; return what it holds or why there is none.
    """
    if teacher.tokenizer is None or tokenizer.fingerprint() != teacher.tokenizer.fingerprint():
        return (
            "none, because the dataset's tokens are not the endpoint's: leave out "
            "--tokenizer-path, or cache the dataset from the model's files with "
            "`xinslm cache`"
        )
    folder = config.output_dir / CACHE
    dataset = open_dataset(config.output_dir / DATA)
    fmt = endpoint_format(tokenizer.vocab_size, default_top_k(config.top_k, 0))
    if not (folder / MANIFEST).is_file():
        scorer = WrittenScorer(splits, tokenizer, fmt)
        made = _cache_config(config)
        plan = cache_plan(made, dataset, teacher, fmt, scorer)
        write_cache(made, dataset, plan, scorer, on_progress)
    cache = Cache(folder)
    valid = sum(
        int((entries["flags"] & 1).sum())
        for name in cache.manifest["shards"]
        if (split := cache.split(name)) is not None
        for entries in split.fixed_parts
    )
    targets = sum(split["targets"] for split in dataset.manifest["splits"].values())
    return (
        f"{folder}, from the log-probabilities that came with the text: {valid:,} of {targets:,} "
        "target tokens have them; the others are learned from the text alone"
    )
