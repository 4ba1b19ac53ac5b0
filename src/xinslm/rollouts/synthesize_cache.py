"""Cache entries from what an endpoint said beside the text that it wrote: its most likely tokens at
each place.

They are found again by bytes: the answer's positions get entries as long as the dataset's tokens
are those that the server wrote. Where it cut the text into other tokens than the tokenizer does,
what it said from there on was said of another context, and the text alone teaches; so it does at an
answer's end, of which servers say nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.cache.endpoint_scorer import top_k_entries
from xinslm.cache.entries import CacheFormat
from xinslm.cache.scorers import ENTRIES
from xinslm.data.dataset import Split
from xinslm.rollouts.synthesize_data import Answer
from xinslm.teachers.base import Generation


class WrittenScorer:
    """A `Scorer` that asks nobody: it reads what came with the answers, which are the documents in
    their order.
    """

    def __init__(self, answers: dict[str, list[Answer]], tokenizer: Any, fmt: CacheFormat) -> None:
        self.answers, self.tokenizer, self.format = answers, tokenizer, fmt
        self.arrays = {ENTRIES: fmt.dtype}
        special = set(tokenizer.special_tokens.values())
        # Where a byte has a token of its own beside a piece that says the same, the piece comes
        # later and is the usual.
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
        """The head's tokens in our ids; what is none of ours stays in the tail."""
        ours: dict[int, float] = {}
        for data, value in top:
            token = self.ids.get(data)
            if token is not None:
                ours.setdefault(token, value)
        return list(ours.items())[: self.format.top_k]

    def _match(self, targets: list[bytes], written: Generation) -> tuple[list[int], list[int]]:
        """Pairs of a target and a token of the server's, from the answer's first on, as long as
        they are the same.
        """
        answer = written.text.encode()
        said = b"".join(written.token_bytes)
        shift = said.rfind(answer)  # what a model thought before it answered is not in the text
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
