"""Cache entries from an endpoint that scores given text: one request a sequence, several in flight.

The head is exact, the tail is one bucket without tail samples: the server tells the n most likely
tokens and nothing of the rest, so a normaliser at another temperature cannot be known either, and
the cache's temperature is 1. Finished documents stand in a journal, so that what a broken server
costs is the requests in flight.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xinslm.cache.entries import CacheFormat, pack_entries
from xinslm.cache.journal import Journal
from xinslm.cache.scorers import ENTRIES
from xinslm.data.dataset import Split
from xinslm.data.packing import sequences
from xinslm.errors import UsageError, XinslmError
from xinslm.teachers.client import in_flight
from xinslm.teachers.endpoint import EndpointTeacher


@dataclass(frozen=True)
class _Job:
    """One document: its place in the shard's stream, and its tokens."""

    number: int
    start: int
    tokens: np.ndarray
    counts: np.ndarray


def endpoint_format(vocab_size: int, top_k: int) -> CacheFormat:
    """Entries without tail samples, at temperature 1."""
    return CacheFormat(vocab_size, min(top_k, vocab_size - 1), 0, 1.0)


def top_k_entries(
    ids: np.ndarray, log_probs: np.ndarray, label_log_probs: np.ndarray, fmt: CacheFormat
) -> np.ndarray:
    """Entries without tail samples: ids (N, h) int64 and their log-probabilities, log p of the
    tokens that came (N,).
    """
    probs = torch.from_numpy(np.exp(log_probs))
    tail = 1 - probs.sum(dim=1)
    tail = torch.where(tail < 1e-6, 0.0, tail)  # servers round; what is left over then is no mass
    none = torch.zeros(len(ids), dtype=torch.bool)
    zeros = torch.zeros(len(ids))
    return pack_entries(
        torch.from_numpy(ids), probs, tail, none, zeros, torch.from_numpy(label_log_probs), fmt
    )


class EndpointScorer:
    """Sparse entries from an `EndpointTeacher` that scores given text; a `Scorer`."""

    def __init__(self, teacher: EndpointTeacher, fmt: CacheFormat, max_seq_length: int) -> None:
        # the token that comes last, and one that vLLM insists on writing
        if max_seq_length + 2 > teacher.max_length:
            raise UsageError(
                f"max_seq_length is {max_seq_length}, but {teacher.name} has a context of "
                f"{teacher.max_length} tokens "
                f"and needs two more: pass --max-seq-length {teacher.max_length - 2}"
            )
        self.teacher, self.format, self.max_seq_length = teacher, fmt, max_seq_length
        self.arrays = {ENTRIES: fmt.dtype}

    def shard(
        self, split: Split, first: int, last: int, scratch: Path, tell: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Score documents `first` to `last`; positions that are no targets keep flag 0."""
        begin, end = int(split.documents[first]), int(split.documents[last])
        entries = np.zeros(end - begin, self.format.dtype)
        done: set[int] = set()
        seen = 0
        with Journal(scratch) as journal:
            for entry in journal:
                number = entry.get("document", -1)
                if first <= number < last and self._take(
                    entries, split, number, begin, entry.get("entries")
                ):
                    done.add(number)
                    seen += int(split.documents[number + 1] - split.documents[number])
            tell(seen)
            jobs = [
                self._job(split, number, begin)
                for number in range(first, last)
                if number not in done
            ]
            for job, found in in_flight(self._score, jobs, self.teacher.config.concurrency):
                journal.append(
                    {"document": job.number, "entries": base64.b64encode(found.tobytes()).decode()}
                )
                entries[job.start : job.start + len(found)] = found
                seen += len(found)
                tell(seen)
        return {ENTRIES: entries}

    def _take(
        self, entries: np.ndarray, split: Split, number: int, begin: int, written: object
    ) -> bool:
        """Put a journal's entries of a document in their place; False where they are damaged."""
        start, end = (int(x) - begin for x in split.documents[number : number + 2])
        try:
            data = base64.b64decode(str(written), validate=True)
        except ValueError:
            return False
        if len(data) != (end - start) * self.format.dtype.itemsize:
            return False
        entries[start:end] = np.frombuffer(data, self.format.dtype)
        return True

    def _job(self, split: Split, number: int, begin: int) -> _Job:
        start, end = (int(x) for x in split.documents[number : number + 2])
        tokens = np.asarray(split.tokens[start:end]).astype(np.int64)
        return _Job(number, start - begin, tokens, np.asarray(split.mask[start:end]) != 0)

    def _score(self, job: _Job) -> np.ndarray:
        """Entries of one document, sequence by sequence."""
        entries = np.zeros(len(job.tokens), self.format.dtype)
        starts, lengths = sequences(np.array([0, len(job.tokens)]), self.max_seq_length)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            wanted = np.flatnonzero(job.counts[start + 1 : start + length + 1])
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
