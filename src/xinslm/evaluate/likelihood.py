"""Log-likelihoods of continuations, with everything that texts have in common computed once.

The definition is that of lm-evaluation-harness 0.4.13 (`HFLM._loglikelihood_tokens`): the model
reads context and continuation, cut on the left to its context; the value is the sum of the
log-probabilities of the continuation's tokens over all rows of the output matrix, and the flag says
whether each of them is the most likely one. The harness runs each pair alone; here they form one
tree (`trie.py`), the output matrix is applied only where a token is scored, and the log-softmax is
computed in at least float32.

    pairs = [Pair(np.array(context_ids), np.array(continuation_ids)), ...]
    values, greedy = LikelihoodScorer(teacher)(pairs)
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.evaluate.native_scorer import NativeScorer
from xinslm.evaluate.trie import Group, Row, plan, size
from xinslm.model.transformer import Transformer
from xinslm.model.tree import read_prefix, read_rows
from xinslm.teachers.own import KEPT_OUTPUTS

BATCH_TOKENS = 512
"""Most tokens in a forward pass, padding included; a single longer row is a pass of its own. 1,024
take as long, and 10 MB more on SmolLM2-135M.
"""
CHUNK_LOGITS = KEPT_OUTPUTS
"""Most logits at once, 8 MB in float32: they stay in a processor's cache, and fit into memory that
the layers have left, which a block of more than 32 MB does not (glibc takes new pages for it).
"""
PREFIX_FACTOR = 16
"""The keys of a pass, prefixes included, are at most this many times `BATCH_TOKENS`."""


Tell = Callable[[int, int, str], None]
"""Receives what is done, what there is to do, and the unit: "tokens" or "answers"."""
Keep = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Receives numbers of pairs, their log-likelihoods and whether they are greedy, (n,) each."""


@dataclass(frozen=True)
class Pair:
    """A context and the continuation whose likelihood is asked for: ids, int (n,), not empty."""

    context: np.ndarray
    continuation: np.ndarray


@dataclass
class Counts:
    """What scoring cost."""

    requested_tokens: int = 0
    """Tokens of all pairs, each alone."""
    computed_tokens: int = 0
    """Tokens that went through the model, without padding."""
    seconds: float = 0.0


class LikelihoodScorer:
    """Scores pairs with a teacher or student that the teachers' adapters have loaded."""

    def __init__(self, model: Any, batch_tokens: int = BATCH_TOKENS) -> None:
        """`model` is a `HuggingFaceTeacher`, an `OwnTeacher` or a `NativeScorer`; only the last two
        share tokens.
        """
        self.model, self.batch_tokens = model, batch_tokens
        self.is_native = isinstance(model, NativeScorer)
        self.shares = self.is_native or isinstance(model.model, Transformer)
        self.counts = Counts()
        self.truncated: list[int] = []
        """Numbers of the last call's pairs whose beginning was cut off to fit the context."""

    def __call__(
        self,
        pairs: Sequence[Pair],
        tell: Tell = lambda done, total, unit: None,
        keep: Keep = lambda numbers, values, greedy: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihoods in nats, float64 (n,), and whether each is greedy, bool (n,).

        `keep` receives the same of the pairs that are finished, from time to time. A likelihood
        that is not finite is returned as it is. ValueError for an empty context or continuation, or
        a continuation longer than the model's context.
        """
        began = time.perf_counter()
        table = _Table(self._counted(pairs), pairs)
        groups = plan(table.texts, table.needed, table.first_slots, self.shares)
        done, total = 0, size(groups)
        held: list[Any] = []
        for group in groups:
            if group.prefix is not None:
                del held[group.level - 1 :]
                states, prefix = self._prefix(group.prefix, held[-1] if held else None)
                held.append(prefix)
                self._finish(table, [group.prefix], states[None], keep)
                tell(done := done + len(group.prefix.tokens), total, "tokens")
            for rows in self._batches(group, held):
                states = self._states(rows, held[-1] if group.level else None)
                self._finish(table, rows, states, keep)
                tell(done := done + sum(len(row.tokens) for row in rows), total, "tokens")
        self.counts.seconds += time.perf_counter() - began
        return table.sums, table.greedy

    def cost(self, pairs: Sequence[Pair]) -> int:
        """Number of tokens that scoring the pairs would compute."""
        table = _Table(_inputs(pairs, self.model.max_length), pairs)
        groups = plan(table.texts, table.needed, table.first_slots, self.shares)
        return size(groups)

    def _counted(self, pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
        limit, self.truncated = self.model.max_length, []
        for number, (pair, ids) in enumerate(zip(pairs, _inputs(pairs, limit), strict=True)):
            if len(pair.context) + len(pair.continuation) - 1 > limit:
                self.truncated.append(number)
            self.counts.requested_tokens += len(ids)
            yield ids

    def _batches(self, group: Group, held: list[Any]) -> list[list[Row]]:
        """Rows of similar length, longest first, within the limits on tokens."""
        past = held[-1].length if group.level else 0
        rows = sorted(group.rows, key=lambda row: -len(row.tokens))
        batches, at = [], 0
        while at < len(rows):
            longest = len(rows[at].tokens)
            fits = min(
                self.batch_tokens // longest, PREFIX_FACTOR * self.batch_tokens // (past + longest)
            )
            batches.append(rows[at : at + max(1, fits)])
            at += max(1, fits)
        return batches

    def _prefix(self, row: Row, prefix: Any) -> tuple[Tensor, Any]:
        """The states of a prefix's tokens, and its keys and values, of the model's own kind."""
        if self.is_native:
            longer: tuple[Tensor, Any] = self.model.read_prefix(row, prefix)
            return longer
        ids = torch.from_numpy(row.tokens).to(self.model.device)
        return read_prefix(self.model.model, ids, prefix)

    def _states(self, rows: list[Row], prefix: Any) -> Tensor:
        """Input of the output matrix for each token, (B, T, ...)."""
        states: Tensor
        if self.is_native:
            states = self.model.read_rows(rows, prefix)
            return states
        longest = max(len(row.tokens) for row in rows)
        if not self.shares:
            states = self.model.states([row.tokens for row in rows])
            lengths = [len(row.tokens) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(states.split(lengths), batch_first=True)
        tokens, positions = np.zeros((2, len(rows), longest), np.int64)
        ends = np.full((len(rows), longest), longest)
        for number, row in enumerate(rows):
            size = len(row.tokens)
            tokens[number, :size], positions[number, :size] = row.tokens, row.positions
            ends[number, :size] = np.where(row.ends == size, longest, row.ends)
        ids, depths, limits = (
            torch.from_numpy(x).to(self.model.device) for x in (tokens, positions, ends)
        )
        return read_rows(self.model.model, ids, depths, limits, prefix)

    def _finish(self, table: "_Table", rows: list[Row], states: Tensor, keep: Keep) -> None:
        """Store what is asked for of the rows' distributions."""
        width = states.shape[1]
        flat = states.reshape(len(rows) * width, -1)
        places = np.concatenate([row.places + n * width for n, row in enumerate(rows)])
        slots = np.concatenate([row.slots for row in rows])
        different, inverse = np.unique(places, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        slots, inverse = slots[order], inverse[order]
        most = max(1, CHUNK_LOGITS // self.model.output_size)
        # of even sizes: products of few rows are slower, and round in another order
        bounds = np.linspace(0, len(different), -(-len(different) // most) + 1).astype(int)
        for begin, end in itertools.pairwise(bounds.tolist()):
            chosen = torch.from_numpy(different[begin:end]).to(flat.device)
            low, high = np.searchsorted(inverse, [begin, end])
            table.fill(slots[low:high], inverse[low:high] - begin, self.model.outputs(flat[chosen]))
        self.counts.computed_tokens += sum(len(row.tokens) for row in rows)
        if len(finished := table.finished()):
            keep(finished, table.sums[finished], table.greedy[finished])


class _Table:
    """The different inputs of pairs, and the results of each token that is scored.

    A slot is a token of an input whose next-token distribution is needed; an entry is a token of a
    continuation, with the slot that it is looked up in.
    """

    def __init__(self, inputs: Iterable[np.ndarray], pairs: Sequence[Pair]) -> None:
        numbers: dict[bytes, int] = {}
        # big-endian bytes sort like the ids
        keys = (ids.astype(">u4").tobytes() for ids in inputs)
        owner = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64)
        distinct = sorted(numbers)
        rank = np.zeros(len(distinct), np.int64)
        rank[[numbers[key] for key in distinct]] = np.arange(len(distinct))
        self.texts = [np.frombuffer(key, ">u4").astype(np.int32) for key in distinct]
        owner = rank[owner]
        scored = np.array([len(pair.continuation) for pair in pairs], np.int64)
        self.needed = np.zeros(len(distinct), np.int64)
        np.maximum.at(self.needed, owner, scored)
        ends = np.cumsum(self.needed)
        self.first_slots = ends - self.needed
        # the entries of pair i lie in the last slots of its input
        slots = [
            np.arange(ends[text] - n, ends[text]) for text, n in zip(owner, scored, strict=True)
        ]
        entry_slots = np.concatenate(slots) if slots else np.zeros(0, np.int64)
        targets = np.fromiter((id for p in pairs for id in p.continuation), np.int64)
        pair = np.repeat(np.arange(len(pairs)), scored)
        order = np.argsort(entry_slots, kind="stable")
        self._slots, self._targets, self._pairs = entry_slots[order], targets[order], pair[order]
        self.sums, self.greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        self._left, self._filled = scored, np.zeros(0, np.int64)

    def fill(self, slots: np.ndarray, rows: np.ndarray, logits: Tensor) -> None:
        """Look up the entries of `slots` in rows `rows` of the logits (n, V), which are lost: in
        place, the log-softmax takes half the time of `torch.logsumexp`.
        """
        low, high = (np.searchsorted(self._slots, slots, side) for side in ("left", "right"))
        counts = high - low
        entries = np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        row = torch.from_numpy(np.repeat(rows, counts)).to(logits.device)
        wanted = torch.from_numpy(self._targets[entries]).to(logits.device)
        highest, best = logits.max(1)
        hits = (best[row] == wanted).cpu().numpy()
        chosen = logits[row, wanted] - highest[row]
        values = chosen - logits.sub_(highest[:, None]).exp_().sum(1).log_()[row]
        np.add.at(self.sums, self._pairs[entries], values.double().cpu().numpy())
        np.logical_and.at(self.greedy, self._pairs[entries], hits)
        np.subtract.at(self._left, self._pairs[entries], 1)
        self._filled = np.union1d(self._filled, self._pairs[entries])

    def finished(self) -> np.ndarray:
        """Numbers of the pairs that were finished since the last call."""
        numbers, self._filled = self._filled, np.zeros(0, np.int64)
        return numbers[self._left[numbers] == 0]


def _inputs(pairs: Sequence[Pair], limit: int) -> Iterator[np.ndarray]:
    """Tokens that the model reads of each pair: all but the last, cut on the left to `limit`."""
    for pair in pairs:
        if not len(pair.context) or not len(pair.continuation):
            raise ValueError("a pair needs at least one token of context and of continuation")
        if len(pair.continuation) > limit:
            raise ValueError(
                f"a continuation of {len(pair.continuation):,} tokens does not fit the context of "
                f"{limit:,}"
            )
        yield np.concatenate([pair.context, pair.continuation[:-1]])[-limit:]
