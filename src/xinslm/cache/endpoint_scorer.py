"""Cache entries from an endpoint that scores given text: one request per sequence, several in
flight.

The top k is exact, and the tail has a mass but no tail samples: the server returns only the n most
likely tokens. A normaliser at another temperature is therefore unknown, and the cache's temperature
is 1. Finished documents are kept in a journal, so an interruption loses only requests in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xinslm.cache.entries import ENTRIES, CacheFormat, pack_entries
from xinslm.cache.journal import ShardJournal
from xinslm.data.dataset import Split
from xinslm.data.packing import sequences
from xinslm.errors import UsageError, XinslmError
from xinslm.teachers.client import in_flight
from xinslm.teachers.endpoint import EndpointTeacher


@dataclass(frozen=True)
class _Job:
    """One document: its places in the shard, its tokens, and which of them are targets."""

    number: int
    places: slice
    tokens: np.ndarray
    is_target: np.ndarray


def endpoint_format(vocab_size: int, top_k: int) -> CacheFormat:
    """Entries without tail samples, at temperature 1."""
    return CacheFormat(vocab_size, min(top_k, vocab_size - 1), 0, 1.0)


def top_k_entries(
    ids: np.ndarray, log_probs: np.ndarray, label_log_probs: np.ndarray, fmt: CacheFormat
) -> np.ndarray:
    """Entries without tail samples: ids and log p (N, h), log p of the labels (N,)."""
    probs = torch.from_numpy(np.exp(log_probs))
    tail = 1 - probs.sum(dim=1)
    tail = torch.where(tail < 1e-6, 0.0, tail)  # servers round; a smaller rest is not mass
    none, zeros = torch.zeros((len(ids), 0), dtype=torch.int64), torch.zeros(len(ids))
    labels = torch.from_numpy(label_log_probs)
    top_k_ids = torch.from_numpy(ids)
    return pack_entries(top_k_ids, probs, tail, none, zeros.long(), zeros, labels, fmt)


class EndpointScorer:
    """Sparse entries from an `EndpointTeacher` that scores given text; a `Scorer`."""

    def __init__(self, teacher: EndpointTeacher, fmt: CacheFormat, max_seq_length: int) -> None:
        # the last token, and one that vLLM always generates
        if max_seq_length + 2 > teacher.max_length:
            raise UsageError(
                f"max_seq_length is {max_seq_length}, but {teacher.name} has a context of "
                f"{teacher.max_length} tokens "
                f"and needs two more: pass --max-seq-length {teacher.max_length - 2}"
            )
        self.teacher, self.format, self.max_seq_length = teacher, fmt, max_seq_length
        self.arrays = {ENTRIES: fmt.dtype}

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, report: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`; positions that are not targets keep flag 0."""
        begin, end = int(split.documents[first]), int(split.documents[last])
        arrays = {ENTRIES: np.zeros(end - begin, self.format.dtype)}
        jobs = [self._job(split, number, begin) for number in range(first, last)]
        # requests cost money: each document is saved at once
        with ShardJournal(scratch, save_seconds=0) as journal:
            left = [job for job in jobs if not journal.restore(job.number, job.places, arrays)]
            seen = end - begin - sum(len(job.tokens) for job in left)
            report(seen)
            for job, found in in_flight(self._score, left, self.teacher.config.concurrency):
                arrays[ENTRIES][job.places] = found
                journal.keep(job.number, job.places, arrays)
                seen += len(found)
                report(seen)
        return arrays

    def _job(self, split: Split, number: int, begin: int) -> _Job:
        start, end = (int(x) for x in split.documents[number : number + 2])
        tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
        places = slice(start - begin, end - begin)
        return _Job(number, places, tokens, np.asarray(split.mask[start:end]) != 0)

    def _score(self, job: _Job) -> np.ndarray:
        """Entries of one document, sequence by sequence."""
        entries = np.zeros(len(job.tokens), self.format.dtype)
        starts, lengths = sequences(np.array([0, len(job.tokens)]), self.max_seq_length)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            wanted = np.flatnonzero(job.is_target[start + 1 : start + length + 1])
            if not len(wanted):
                continue
            try:
                scored = self.teacher.score(job.tokens[start : start + length + 1])
            except XinslmError as error:
                kind = UsageError if isinstance(error, UsageError) else XinslmError
                raise kind(
                    f"document {job.number:,}, tokens {start:,} to {start + length:,}: {error}"
                ) from None
            entries[start + wanted] = top_k_entries(
                scored.ids[wanted],
                scored.log_probs[wanted],
                scored.label_log_probs[wanted],
                self.format,
            )
        return entries
