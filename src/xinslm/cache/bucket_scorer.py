"""Bucket entries from a teacher of any tokenizer.

A shard is scored in groups of documents: the teacher predicts the group's tokens batch by batch,
then the predictions are aligned document by document. Both report progress and are kept in the
shard's journal.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xinslm.alignment.byte_prefix import BytePrefixAligner, prediction_dtype
from xinslm.cache.bucket_entries import bucket_dtype, bucket_entries
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import ENTRIES
from xinslm.cache.journal import ShardJournal
from xinslm.cache.scorers import LOGITS_AT_ONCE, cut_documents, not_finite
from xinslm.data.dataset import Split
from xinslm.data.packing import sequences
from xinslm.teachers.base import DenseTeacher
from xinslm.teachers.local import batches_by_length
from xinslm.topk import blocked_topk

CANDIDATES = 32
"""Most likely tokens that are considered at each of the teacher's positions."""
GROUP_BATCHES = 4
"""Batches in a group of documents, about."""


class BucketScorer:
    """Bucket entries from a dense teacher; a `Scorer`."""

    def __init__(
        self, teacher: DenseTeacher, aligner: BytePrefixAligner, config: CacheConfig, buckets: int
    ) -> None:
        self.teacher, self.aligner, self.config = teacher, aligner, config
        self.arrays: dict[str, np.dtype[Any]] = {ENTRIES: bucket_dtype(len(aligner.order), buckets)}

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, report: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`; positions that are not targets keep flag 0."""
        documents = np.asarray(split.documents[first : last + 1], dtype=np.int64)
        arrays = {ENTRIES: np.zeros(int(documents[-1] - documents[0]), self.arrays[ENTRIES])}
        with ShardJournal(scratch) as journal:
            size = GROUP_BATCHES * self.config.batch_tokens
            for low, high in cut_documents(documents, size):
                group = documents[low : high + 1]
                begin, end = (int(group[at] - documents[0]) for at in (0, -1))
                if not journal.restore(f"{low}", slice(begin, end), arrays):

                    def share(done: float, begin: int = begin, end: int = end) -> None:
                        report(begin + int(done * (end - begin)))

                    arrays[ENTRIES][begin:end] = self._group(split, group, journal, share)
                    journal.keep(f"{low}", slice(begin, end), arrays)
                report(end)
        return arrays

    def _group(
        self,
        split: Split,
        documents: np.ndarray,
        journal: ShardJournal,
        report: Callable[[float], None],
    ) -> np.ndarray:
        """Entries of a group of documents with the given offsets; reports the share done."""
        texts = [np.asarray(split.tokens[a:b]).astype(np.int64) for a, b in pairwise(documents)]
        pairs = [self.aligner.align(text) for text in texts]
        offsets = np.cumsum([0, *(len(pair.teacher_ids) for pair in pairs)])
        tokens = np.concatenate([pair.teacher_ids for pair in pairs])
        name = f"{documents[0]} teacher"
        predictions = self._predictions(tokens, offsets, journal, name, lambda x: report(x / 2))
        entries = []
        begin, size = int(documents[0]), int(documents[-1] - documents[0])
        for text, pair, (a, b), (low, high) in zip(
            texts, pairs, pairwise(documents.tolist()), pairwise(offsets), strict=True
        ):

            def aligned(done: int, before: int = a - begin) -> None:
                report(0.5 + (before + done) / size / 2)

            found = self.aligner.buckets(text, pair, predictions[low:high], aligned)
            is_target = np.asarray(split.mask[a + 1 : b]) != 0
            entries.append(bucket_entries(*found, is_target, self.arrays[ENTRIES]))
        return np.concatenate(entries)

    def _predictions(
        self,
        tokens: np.ndarray,
        documents: np.ndarray,
        journal: ShardJournal,
        name: str,
        report: Callable[[float], None],
    ) -> np.ndarray:
        """Predictions at the place of each token of the teacher, (tokens,) `prediction_dtype`.

        documents: offsets into `tokens`. The first token of a document has NaN: nothing predicts
        it.
        """
        candidates = min(CANDIDATES, self.teacher.vocab_size)
        predictions = np.zeros(len(tokens), prediction_dtype(candidates))
        predictions["label_prob"] = np.nan
        starts, lengths = sequences(documents, self.config.max_seq_length)
        seen = 0
        for step, batch in enumerate(batches_by_length(lengths, self.config.batch_tokens)):
            texts = [tokens[starts[k] : starts[k] + lengths[k]] for k in batch]
            places = np.concatenate([np.arange(lengths[k]) + starts[k] + 1 for k in batch])
            kept = {name: predictions}
            if not journal.restore(f"{name} {step}", places, kept):
                predictions[places] = self._predict(texts, tokens[places], candidates)
                journal.keep(f"{name} {step}", places, kept)
            seen += len(places)
            report(seen / max(int(lengths.sum()), 1))
        return predictions

    def _predict(self, texts: list[np.ndarray], labels: np.ndarray, candidates: int) -> np.ndarray:
        """Predictions of one batch of texts; labels: the token after each of theirs."""
        predicted = np.zeros(len(labels), prediction_dtype(candidates))
        states = self.teacher.states(texts)
        chunk = max(1, LOGITS_AT_ONCE // self.teacher.vocab_size)
        for at in range(0, len(labels), chunk):
            probs = torch.softmax(self.teacher.logits(states[at : at + chunk]), dim=1)
            top_probs, top_ids = blocked_topk(probs, candidates)
            label = torch.from_numpy(labels[at : at + chunk]).to(probs.device)[:, None]
            rows = predicted[at : at + chunk]
            rows["top_ids"], rows["top_probs"] = top_ids.cpu().numpy(), top_probs.cpu().numpy()
            rows["label_prob"] = probs.gather(1, label)[:, 0].cpu().numpy()
        if not np.isfinite(predicted["label_prob"]).all():
            raise not_finite(self.teacher.name, "the probability of a token is not finite")
        return predicted
