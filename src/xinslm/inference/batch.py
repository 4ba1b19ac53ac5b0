"""Many texts at once: batched generation with a key-value cache, for whoever needs thousands of
completions.

Prompts are sorted by length and left-padded a little, so that all rows of a batch write the same
column of one cache that is allocated once; positions and masks are each row's own. A row that ends
leaves the batch: the last row moves into its place. Token t of completion i is drawn with the t-th
number of a generator that (seed, i) begins, so a text does not depend on its neighbours. The
distribution is `Sampler`'s. A sequence of P prompt and N new tokens costs P + N - 1 token-forwards,
and the head is applied to the last position only.

    result = generate_batch(model, prompts, Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    seed=1), 128, ends)
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.inference.config import Sampling
from xinslm.model.transformer import KVCache, Transformer
from xinslm.topk import BLOCK, blocked_topk

PREFILL_TOKENS = 4096
"""Prompt tokens of one forward pass."""
MOST_ROWS = 128
"""Texts side by side beyond which nothing becomes faster."""
CACHE_BYTES = 2 << 30
"""Most bytes of keys and values, where the number of rows is not given."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind one prompt."""

    tokens: np.ndarray
    """Ids, int64, (n,); the end token, where one came, is the last."""
    ended: bool
    """Whether an end token came; if not, the length or the context was full."""
    top: np.ndarray
    """The model's most likely ids at each place, most likely first, int64, (n, k); k is 0 unless
    asked for.
    """


@dataclass(frozen=True)
class Completions:
    """Completions in the order of their prompts, and what they cost."""

    texts: list[Completion]
    token_forwards: int
    """Tokens that went through the model, pads and rows that had ended included."""


class _Rows(KVCache):
    """A cache whose first rows are in use, and of which a pass may fill a range of rows."""

    rows = slice(0, 0)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (rows, K, T, D) behind the past of the rows in use, return both together."""
        end = self.length + keys.shape[2]
        own_keys, own_values = self.keys[layer, self.rows], self.values[layer, self.rows]
        own_keys[:, :, self.length : end] = keys
        own_values[:, :, self.length : end] = values
        return own_keys[:, :, :end], own_values[:, :, :end]

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy whole rows."""
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
    *,
    vocab_size: int | None = None,
    rows: int | None = None,
    top: int = 0,
    first_index: int = 0,
    tell: Callable[[int, int], None] = lambda texts, tokens: None,
) -> Completions:
    """Continue each prompt (ids, at least one) until an end token, `max_new_tokens`, or the model's
    context.

    `sampling.seed` must be given unless its temperature is 0; completion i draws with (seed,
    first_index + i), in whatever batch it is. `rows` texts are written side by side, by default up
    to 128, as many as 2 GiB of keys and values allow. `vocab_size` cuts off rows of a padded
    vocabulary. `top` keeps that many ids a place. `tell` hears of finished texts and their tokens.
    Raises UsageError for a prompt longer than the context.
    """
    sampling.check()
    if sampling.seed is None and sampling.temperature:
        raise UsageError("batched generation needs a seed")
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
        model, sampling, max_new_tokens, end_ids, vocab_size or model.config.vocab_size, top
    )
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
        found = batches.run([np.asarray(prompts[i]) for i in numbers], first_index + numbers)
        for number, completion in zip(numbers, found, strict=True):
            texts[number] = completion
        done, tokens = done + len(found), tokens + sum(len(c.tokens) for c in found)
        tell(done, tokens)
    return Completions([text for text in texts if text is not None], batches.token_forwards)


def rows_that_fit(model: Transformer, tokens: int) -> int:
    """Texts of that many tokens each whose keys and values fit into `CACHE_BYTES`; from 1 to
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
    """Runs one batch after another through the same buffers."""

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
        """Completions of one batch, the longest prompt first."""
        count, longest = len(prompts), len(prompts[0])
        lengths = np.array([len(prompt) for prompt in prompts])
        # The last token of a full context is written, but never read.
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
        row = np.arange(count)  # which text each row in use writes
        padded = bool(pads.max())
        for step in itertools.count():
            if not bool(torch.isfinite(state).all()):
                raise XinslmError(
                    "the model's states are not finite while it writes; its weights are damaged"
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
        seed = self.sampling.seed
        if self.sampling.temperature == 0 or seed is None:
            return np.zeros((len(numbers), self.max_new))
        return np.stack(
            [np.random.default_rng((seed, int(number))).random(self.max_new) for number in numbers]
        )

    def _prefill(
        self, prompts: list[np.ndarray], pads: Tensor, seen: Tensor, cache: _Rows
    ) -> Tensor:
        """Run the prompts; return the states that predict what comes next, (rows, hidden)."""
        longest = len(prompts[0])
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        for at, prompt in enumerate(prompts):
            ids[at, longest - len(prompt) :] = prompt
        inputs = torch.from_numpy(ids).to(self.device)
        column = torch.arange(longest, device=self.device)
        positions = (column - pads[:, None]).clamp_min(0)
        causal = (column <= column[:, None])[None]
        # a pad that saw nothing would be NaN
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
        """(rows, hidden) -> logits (rows, vocabulary) in one buffer, the width filled to whole
        blocks with -inf.
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
        """Move the last rows that stay into the places of those that go; return the row each place
        now holds.
        """
        left = int(stays.sum())
        kept = np.arange(left)
        holes = np.flatnonzero(~stays[:left])
        movers = left + np.flatnonzero(stays[left:])
        kept[holes] = movers
        cache.move(movers.tolist(), holes.tolist())
        return kept

    def _reserve(self, rows: int, length: int) -> _Rows:
        """One cache for all batches; the first batch has the longest prompts and as many rows as
        any.
        """
        if (
            self.cache is None
            or self.cache.keys.shape[1] < rows
            or self.cache.keys.shape[3] < length
        ):
            self.cache = None  # free the old one first
            self.cache = _Rows(self.model.config, rows, length, self.head.dtype, self.device)
        self.cache.length = 0
        return self.cache


def choose(logits: Tensor, sampling: Sampling, uniforms: np.ndarray) -> Tensor:
    """Draw one id a row, (rows,) int64, with one uniform number each; logits (rows, width), -inf
    where no token is.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    quantiles = torch.from_numpy(uniforms).to(logits.device, wide)[:, None]
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return _draw_from_all(logits.float(), sampling.temperature, quantiles)
    ids, probabilities = kept_tokens(logits.float(), sampling)
    cumulative = probabilities.to(wide).cumsum(dim=1)
    places = torch.searchsorted(cumulative, quantiles * cumulative[:, -1:], right=True)
    last = (probabilities > 0).sum(dim=1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(places, last))[:, 0]


def kept_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`Sampler.distribution` for rows: ids and probabilities, most likely first, 0 where a filter
    took a token out.
    """
    for k in (sampling.top_k,) if sampling.top_k else (256, logits.shape[1]):
        values, ids = blocked_topk(logits, min(k, logits.shape[1]))
        wide = values if values.device.type == "mps" else values.double()
        # Without top_k the filters look at the whole distribution, of which the first tokens are a
        # part.
        total = wide.logsumexp(dim=1, keepdim=True)
        if not sampling.top_k:
            total = torch.logsumexp(logits, dim=1, keepdim=True).to(wide.dtype)
        p = (wide - total).exp()
        before = p.cumsum(dim=1) - p
        keeps = (before < sampling.top_p * (1 - 1e-12)) & (p >= sampling.min_p * p[:, :1])
        if sampling.top_p == 1:
            keeps = p >= sampling.min_p * p[:, :1]
        if sampling.top_k or not bool(keeps[:, -1].any()):
            break
    scaled = (wide / sampling.temperature).masked_fill(~keeps, -torch.inf)
    return ids, torch.softmax(scaled, dim=1)


def _draw_from_all(logits: Tensor, temperature: float, quantiles: Tensor) -> Tensor:
    """Invert the distribution function in two levels, blocks and tokens in a block: short sums, one
    pass.
    """
    rows, width = logits.shape
    weights = (
        (logits - logits.amax(dim=1, keepdim=True)).div_(temperature).exp_().view(rows, -1, BLOCK)
    )
    cumulative = weights.sum(dim=2).to(quantiles.dtype).cumsum(dim=1)
    targets = quantiles * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, targets, right=True).clamp(max=width // BLOCK - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = (
        weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
        .to(quantiles.dtype)
        .cumsum(dim=1)
    )
    place = (inside <= targets - before).sum(dim=1, keepdim=True)
    # rounding: never a weight of 0
    place = torch.minimum(place, (inside < inside[:, -1:]).sum(dim=1, keepdim=True))
    return (block * BLOCK + place)[:, 0]
