"""Batched generation with a key-value cache, for thousands of completions.

Prompts are sorted by length and left-padded, so that all rows of a batch write the same column of
one cache, which is allocated once; each row has its own positions and mask. A row that ends leaves
the batch: the last row moves into its place. Token t of completion i is drawn with the t-th number
of a generator seeded with (seed, i), so a text does not depend on its batch. The distribution is
`Sampler`'s. P prompt tokens and N new tokens cost P + N - 1 token-forwards, and the LM head is
applied to the last position only.

This loop moves rows of the cache, so it needs our transformer; `teachers.generate` works with any
causal model, and `inference.generate` streams one text from an `Engine`.

    result = generate_batch(model, prompts, Sampling(temperature=1.0, seed=1), 128, ends)
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xinslm.draw import choose
from xinslm.errors import UsageError, XinslmError
from xinslm.model.transformer import KVCache, Transformer
from xinslm.sampling import Sampling
from xinslm.topk import BLOCK, blocked_topk

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass."""
MOST_ROWS = 128
"""Number of parallel texts beyond which throughput does not grow."""
CACHE_BYTES = 2 << 30
"""Most bytes of keys and values, if the number of rows is not given."""


@dataclass(frozen=True)
class BatchOptions:
    """Optional settings of `generate_batch`."""

    vocab_size: int | None = None
    """Ids of the tokenizer; later rows of a padded vocabulary are never drawn."""
    rows: int | None = None
    """Texts written in parallel; by default up to 128, as many as 2 GiB of keys and values
    allow.
    """
    top: int = 0
    """Number of most likely ids to keep for each token."""
    first_index: int = 0
    """Index of the first completion; completion i draws with (seed, first_index + i)."""


@dataclass(frozen=True)
class Completion:
    """Continuation of one prompt."""

    tokens: np.ndarray
    """Ids, int64, (n,); includes the end token, if there is one."""
    ended: bool
    """Whether an end token came; otherwise the length limit or the context was reached."""
    top: np.ndarray
    """The model's most likely ids at each position, most likely first, int64, (n, k); k is 0 unless
    requested.
    """


@dataclass(frozen=True)
class Completions:
    """Completions in the order of their prompts, and their cost."""

    texts: list[Completion]
    token_forwards: int
    """Tokens that went through the model, including pads and rows that had ended."""


class _Rows(KVCache):
    """A cache whose first rows are in use; a forward pass may fill a range of rows."""

    rows = slice(0, 0)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (rows, K, T, D) to the past of the rows in use; return past and new together."""
        end = self.length + keys.shape[2]
        own_keys, own_values = self.keys[layer, self.rows], self.values[layer, self.rows]
        own_keys[:, :, self.length : end] = keys
        own_values[:, :, self.length : end] = values
        return own_keys[:, :, :end], own_values[:, :, :end]

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows."""
        for buffer in (self.keys, self.values):
            for a, b in zip(source, target, strict=True):
                buffer[:, b, :, : self.length] = buffer[:, a, :, : self.length]


@torch.inference_mode()
def generate_batch(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    max_new_tokens: int,
    end_ids: frozenset[int],
    options: BatchOptions | None = None,
    tell: Callable[[int, int], None] = lambda texts, tokens: None,
) -> Completions:
    """Continue each prompt (ids, at least one) until an end token, `max_new_tokens`, or the model's
    context.

    `sampling.seed` is required unless the temperature is 0. `tell` receives the numbers of finished
    texts and of their tokens. Raises UsageError for a prompt longer than the context.
    """
    sampling.check()
    sampling.required_seed()
    options = options or BatchOptions()
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    context = model.config.max_position_embeddings
    if len(lengths) and (lengths.min() < 1 or lengths.max() > context):
        wrong = int(lengths[(lengths < 1) | (lengths > context)][0])
        raise UsageError(
            f"a prompt of {wrong} tokens cannot be continued: the model's context is "
            f"{context} tokens"
        )
    model.eval()
    batches = _Batches(
        model,
        sampling,
        max_new_tokens,
        end_ids,
        options.vocab_size or model.config.vocab_size,
        options.top,
    )
    rows = options.rows
    if rows is None and len(lengths):
        rows = rows_that_fit(
            model, int(lengths.max()) + min(max_new_tokens, context - int(lengths.min()) + 1)
        )
    rows = rows or MOST_ROWS
    order = np.argsort(-lengths, kind="stable")
    texts: list[Completion | None] = [None] * len(prompts)
    done = tokens = 0
    for at in range(0, len(order), rows):
        numbers = order[at : at + rows]
        found = batches.run(
            [np.asarray(prompts[i]) for i in numbers], options.first_index + numbers
        )
        for number, completion in zip(numbers, found, strict=True):
            texts[number] = completion
        done, tokens = done + len(found), tokens + sum(len(c.tokens) for c in found)
        tell(done, tokens)
    return Completions([text for text in texts if text is not None], batches.token_forwards)


def rows_that_fit(model: Transformer, tokens: int) -> int:
    """Number of texts of `tokens` tokens whose keys and values fit into `CACHE_BYTES`; 1 to
    `MOST_ROWS`.
    """
    shape = model.config
    token = (
        2
        * shape.num_hidden_layers
        * shape.num_key_value_heads
        * shape.head_dim
        * model.head_weight.element_size()
    )
    return max(1, min(MOST_ROWS, CACHE_BYTES // (token * tokens)))


class _Batches:
    """Runs one batch after another in the same buffers."""

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        max_new: int,
        end_ids: frozenset[int],
        vocab_size: int,
        top: int,
    ) -> None:
        self.model, self.sampling, self.max_new, self.top = model, sampling, max_new, top
        self.end_ids = np.array(sorted(end_ids), dtype=np.int64)
        self.vocab_size, self.head = vocab_size, model.head_weight[:vocab_size]
        self.device = self.head.device
        self.token_forwards = 0
        self.cache: _Rows | None = None
        self.logits = torch.empty(0, 0)

    def run(self, prompts: list[np.ndarray], numbers: np.ndarray) -> list[Completion]:
        """Completions of one batch, sorted by falling prompt length."""
        count, longest = len(prompts), len(prompts[0])
        lengths = np.array([len(prompt) for prompt in prompts])
        # The last token of a full context is written, but never an input.
        limits = np.minimum(self.max_new, self.model.config.max_position_embeddings - lengths + 1)
        columns = longest + int(limits.max())
        cache = self._reserve(count, columns)
        pads = torch.from_numpy(longest - lengths).to(self.device)
        seen = torch.arange(columns, device=self.device) >= pads[:, None]  # (rows, columns)
        state = self._prefill(prompts, pads, seen, cache)
        uniforms = self._uniforms(numbers)
        tokens = np.zeros((count, self.max_new), dtype=np.int64)
        tops = np.zeros((count, self.max_new, self.top), dtype=np.int64)
        written, ended = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        row = np.arange(count)  # index of the text that each row in use writes
        padded = bool(pads.max())
        for step in itertools.count():
            if not bool(torch.isfinite(state).all()):
                raise XinslmError(
                    "the model's hidden states are not finite during generation; its weights are "
                    "damaged"
                )
            logits = self._project(state)
            chosen = choose(logits, self.sampling, uniforms[row, step])
            if self.top:
                tops[row, step] = blocked_topk(logits, self.top)[1].cpu().numpy()
            new = chosen.cpu().numpy()
            tokens[row, step], written[row] = new, step + 1
            ended[row] = np.isin(new, self.end_ids)
            stays = ~ended[row] & (limits[row] > step + 1)
            if not stays.any():
                break
            if not stays.all():
                kept = self._close_gaps(stays, cache)
                index = torch.from_numpy(kept).to(self.device)
                row, chosen, pads, seen = row[kept], chosen[index], pads[index], seen[index]
            cache.rows = slice(0, len(row))
            mask = seen[:, None, None, : cache.length + 1] if padded else None
            state = self._forward(chosen[:, None], cache.length - pads[:, None], mask, cache)
            cache.length += 1
        return [
            Completion(tokens[i, :n].copy(), bool(ended[i]), tops[i, :n].copy())
            for i, n in enumerate(written)
        ]

    def _uniforms(self, numbers: np.ndarray) -> np.ndarray:
        seed = self.sampling.required_seed()
        if self.sampling.temperature == 0:
            return np.zeros((len(numbers), self.max_new))
        return np.stack(
            [np.random.default_rng((seed, int(number))).random(self.max_new) for number in numbers]
        )

    def _prefill(
        self, prompts: list[np.ndarray], pads: Tensor, seen: Tensor, cache: _Rows
    ) -> Tensor:
        """Run the prompts; return the last hidden states, (rows, hidden)."""
        longest = len(prompts[0])
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        for at, prompt in enumerate(prompts):
            ids[at, longest - len(prompt) :] = prompt
        inputs = torch.from_numpy(ids).to(self.device)
        column = torch.arange(longest, device=self.device)
        positions = (column - pads[:, None]).clamp_min(0)
        causal = (column <= column[:, None])[None]
        # a pad attends to itself, otherwise softmax gives NaN
        itself = torch.eye(longest, dtype=torch.bool, device=self.device)
        states, chunk = [], max(1, PREFILL_TOKENS // longest)
        for first in range(0, len(prompts), chunk):
            cache.rows = slice(first, min(first + chunk, len(prompts)))
            own = seen[cache.rows]
            mask = None
            if bool(pads[cache.rows].max()):
                mask = ((causal & own[:, None, :longest]) | itself)[:, None]
            states.append(self._forward(inputs[cache.rows], positions[cache.rows], mask, cache))
        cache.length = longest
        return torch.cat(states)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: _Rows) -> Tensor:
        """Run the blocks on ids (rows, T); return the final states of the last column, (rows,
        hidden).
        """
        self.token_forwards += ids.numel()
        length, past = ids.shape[1], cache.length
        window = (
            self.model.mask(length, past, None, self.device)
            if self.model.config.sliding_window
            else None
        )
        if window is not None:
            mask = window if mask is None else mask & window
        x = self.model.model.embed_tokens(ids)
        cos, sin = self.model.rotary(positions, x.dtype)
        for block in self.model.model.layers:
            x = block(x, cos, sin, mask, cache)
        state: Tensor = self.model.model.norm(x[:, -1])
        return state

    def _project(self, state: Tensor) -> Tensor:
        """(rows, hidden) -> logits (rows, vocabulary) in one buffer, padded with -inf to a multiple
        of `BLOCK`.
        """
        width = -(-self.vocab_size // BLOCK) * BLOCK
        if self.logits.shape[0] < len(state) or self.logits.dtype != state.dtype:
            self.logits = torch.full(
                (len(state), width), -torch.inf, dtype=state.dtype, device=self.device
            )
        logits = self.logits[: len(state)]
        torch.mm(state, self.head.t(), out=logits[:, : self.vocab_size])
        return logits

    def _close_gaps(self, stays: np.ndarray, cache: _Rows) -> np.ndarray:
        """Move the last remaining rows into the gaps; return which row each index now holds."""
        left = int(stays.sum())
        kept = np.arange(left)
        holes = np.flatnonzero(~stays[:left])
        movers = left + np.flatnonzero(stays[left:])
        kept[holes] = movers
        cache.move(movers.tolist(), holes.tolist())
        return kept

    def _reserve(self, rows: int, length: int) -> _Rows:
        """One cache for all batches; the first batch has the longest prompts and the most rows."""
        if (
            self.cache is None
            or self.cache.keys.shape[1] < rows
            or self.cache.keys.shape[3] < length
        ):
            self.cache = None  # free the old one first
            self.cache = _Rows(self.model.config, rows, length, self.head.dtype, self.device)
        self.cache.length = 0
        return self.cache
