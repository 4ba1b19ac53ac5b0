"""Log-likelihood of documents, computed like the rolling perplexity of lm-evaluation-harness.

Each token is scored exactly once. A document longer than the context is cut into disjoint windows;
the last one is filled up with earlier tokens as context. The first token is predicted from the
prefix token (BOS, else EOS). Tokens that stand for no bytes, such as the end of a document or a
marker of the chat template, are context but are not scored, because metrics are per byte of text.

The distribution covers the tokenizer's ids, as in sampling. Padding rows of the vocabulary are left
out; the harness includes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from xinslm.errors import XinslmError
from xinslm.heap import HeapKeeper
from xinslm.teachers.base import DenseTeacher

CHUNK_LOGITS = 1 << 24
"""Most logits in one float32 block: 64 MB."""


@dataclass(frozen=True)
class Item:
    """One document, encoded for the model that is measured."""

    source: str
    """File and position, for messages."""
    tokens: np.ndarray
    """Ids, the prefix token first; (n,)."""
    scored: np.ndarray
    """Whether each token counts, bool (n,); the prefix never does."""
    num_bytes: int
    """UTF-8 bytes of the text that the scored tokens represent."""


@dataclass(frozen=True)
class Score:
    """Log-likelihood of one document."""

    log_likelihood: float
    """Sum over the scored tokens, nats."""
    tokens: int
    """Scored tokens."""


@dataclass(frozen=True)
class Window:
    """Part of a document that is scored in one pass."""

    begin: int
    end: int
    """The inputs are tokens[begin:end], and predict tokens[begin + 1 : end + 1]."""
    predicted: int
    """Number of predictions, counted from the end, that are not in an earlier window."""


def rolling_windows(num_tokens: int, max_length: int) -> list[Window]:
    """Cut the `num_tokens` - 1 tokens after the prefix into windows that predict each exactly once.

    Equal to `get_rolling_token_windows` with context_len=1 and `make_disjoint_window` of lm-eval
    0.4.13.
    """
    windows: list[Window] = []
    done = 0  # tokens predicted so far; token i + 1 of the document is the (i + 1)th to predict
    while done < num_tokens - 1:
        count = min(max_length, num_tokens - 1 - done)
        done += count
        windows.append(Window(max(0, done - max_length), done, count))
    return windows


def score(
    scorer: DenseTeacher,
    items: Sequence[Item],
    batch_tokens: int = 8192,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[Score]:
    """Score documents in the given order; `on_tokens` receives the number of tokens of each
    finished batch.

    An XinslmError names the first document whose likelihood is not finite.
    """
    jobs = [
        (index, window)
        for index, item in enumerate(items)
        for window in rolling_windows(len(item.tokens), scorer.max_length)
        if item.scored[window.end - window.predicted + 1 : window.end + 1].any()
    ]
    # longest first: little padding, and an out-of-memory error comes at once
    jobs.sort(key=lambda job: job[1].begin - job[1].end)
    sums = np.zeros(len(items))
    at, heap = 0, HeapKeeper()
    while at < len(jobs):
        longest = jobs[at][1].end - jobs[at][1].begin
        batch = jobs[at : at + max(1, batch_tokens // longest)]
        at += len(batch)
        values = _batch_log_likelihoods(scorer, items, batch)
        for (index, _), value in zip(batch, values, strict=True):
            if not math.isfinite(value):
                raise XinslmError(
                    f"{items[index].source}: its log-likelihood is {value}; the model's weights "
                    "are damaged "
                    "or its numbers overflow (try --dtype float32 and float activations)"
                )
            sums[index] += value
        heap.after_step()
        on_tokens(sum(window.end - window.begin for _, window in batch))
    return [
        Score(float(total), int(item.scored.sum())) for total, item in zip(sums, items, strict=True)
    ]


def _batch_log_likelihoods(
    scorer: DenseTeacher, items: Sequence[Item], batch: list[tuple[int, Window]]
) -> list[float]:
    """Sum the log-probabilities of each window's scored tokens, float64."""
    inputs = [items[index].tokens[window.begin : window.end] for index, window in batch]
    states = scorer.states(inputs)
    rows, targets, owners = [], [], []
    offset = 0
    for owner, (index, window) in enumerate(batch):
        item = items[index]
        # inputs whose predictions are new
        places = np.arange(window.end - window.predicted, window.end)
        places = places[item.scored[places + 1]]
        rows.append(offset + places - window.begin)
        targets.append(item.tokens[places + 1])
        owners.append(np.full(len(places), owner))
        offset += window.end - window.begin
    picked = torch.from_numpy(np.concatenate(rows)).to(states.device)
    wanted = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(states.device)
    step = max(1, CHUNK_LOGITS // scorer.vocab_size)
    parts = []
    for at in range(0, len(picked), step):
        logits = scorer.logits(states[picked[at : at + step]])
        chosen = logits.gather(1, wanted[at : at + step, None])[:, 0]
        parts.append((chosen - logits.logsumexp(1)).cpu().numpy())
    log_probabilities = np.concatenate(parts).astype(np.float64)
    return np.bincount(np.concatenate(owners), log_probabilities, minlength=len(batch)).tolist()
