"""Scoring with int8 activations in the native library: the arithmetic of
`Transformer(activations="int8")` and of llama.cpp, many times as fast as PyTorch's.

A tree of texts (`trie.py`) becomes sequences that share the keys and values of their common
beginnings.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xinslm.evaluate.trie import Row
from xinslm.inference.native_batch import NativeDecoder, in_parts, kept_bytes, remove_all
from xinslm.inference.native_engine import build
from xinslm.inference.raw_weights import RawModel
from xinslm.machine import usable_cores
from xinslm.native.model import NativeContext
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer


class NativePrefix:
    """Tokens that rows continue: a sequence, which ends with this object."""

    def __init__(self, context: NativeContext, parent: "NativePrefix | None") -> None:
        self.length: int = 0 if parent is None else parent.length
        source = None if parent is None else parent.sequence
        self.sequence: int = context.add(source, self.length)
        weakref.finalize(self, context.remove, self.sequence)


class NativeScorer:
    """A `DenseTeacher` on the native library; it also reads trees and writes batches."""

    device = torch.device("cpu")

    def __init__(self, name: Path | str, raw: RawModel, fingerprint: str) -> None:
        self.name, self.fingerprint = str(name), fingerprint
        self.tokenizer = load_tokenizer(name)
        check_vocabulary(raw.config.vocab_size, self.tokenizer, self.name)
        self.vocab_size: int = self.tokenizer.vocab_size
        self.max_length = raw.config.max_position_embeddings
        self.output_size: int = raw.config.vocab_size
        self.hidden_size: int = raw.config.hidden_size
        self.positions: int = raw.config.max_position_embeddings
        self.cache_bytes_per_token = kept_bytes(raw)
        self.context = NativeContext(build(raw), usable_cores())

    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Outputs of the last layer, float32 (total tokens, hidden)."""
        parts = []
        for ids in sequences:
            number = self.context.add()
            try:
                owners, wanted = np.full(len(ids), number), np.arange(len(ids))
                parts.append(in_parts(self.context.extend_states, ids, owners, wanted))
            finally:
                self.context.remove(number)
        return torch.from_numpy(np.concatenate(parts))

    def logits(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab_size) float32."""
        return self.outputs(states)[:, : self.vocab_size]

    def outputs(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, output_size) float32, padding included."""
        return torch.from_numpy(self.context.logits(states.numpy()))

    def open_decoder(self, rows: int, length: int) -> NativeDecoder:
        """Room for `rows` texts; it grows with them."""
        return NativeDecoder(self.context, rows, self.vocab_size, self.positions)

    def read_prefix(self, row: Row, prefix: NativePrefix | None) -> tuple[Tensor, NativePrefix]:
        """Read the tokens of a row without branches, (T,); return its states (T, hidden) and the
        prefix with them.
        """
        longer = NativePrefix(self.context, prefix)
        longer.length += len(row.tokens)
        owners, places = np.full(len(row.tokens), longer.sequence), np.unique(row.places)
        states = in_parts(self.context.extend_states, row.tokens, owners, places)
        found = torch.zeros(len(row.tokens), self.hidden_size)
        found[torch.from_numpy(places)] = torch.from_numpy(states)
        return found, longer

    def read_rows(self, rows: Sequence[Row], prefix: NativePrefix | None) -> Tensor:
        """States after the tokens of rows that continue a prefix, (B, T, hidden) float32; zeros
        where nothing is asked for.
        """
        width = max(len(row.tokens) for row in rows)
        found = torch.zeros(len(rows), width, self.hidden_size)
        sequences: list[int] = []
        try:
            chains = [chain for number, row in enumerate(rows) for chain in _chains(number, row)]
            for level in range(max(chain.level for chain in chains) + 1):
                now = [chain for chain in chains if chain.level == level]
                # a window's sequence gives back what it has passed: branches come before it grows
                for chain in sorted(now, key=lambda chain: chain.continues):
                    if chain.continues and chain.parent is not None:
                        chain.sequence = chain.parent.sequence
                        continue
                    source = prefix if chain.parent is None else chain.parent
                    begin = int(rows[chain.row].positions[chain.first])
                    number = None if source is None else source.sequence
                    chain.sequence = self.context.add(number, begin)
                    sequences.append(chain.sequence)
                self._read_chains(now, rows, found)
        finally:
            remove_all(self.context, sequences)
        return found

    def _read_chains(self, chains: "list[_Chain]", rows: Sequence[Row], found: Tensor) -> None:
        tokens: list[int] = []
        owners: list[int] = []
        wanted: list[int] = []
        where: list[tuple[int, int]] = []
        for chain in chains:
            row, asked = rows[chain.row], set(rows[chain.row].places.tolist())
            for place in range(chain.first, chain.last):
                if place in asked:
                    wanted.append(len(tokens))
                    where.append((chain.row, place))
                tokens.append(int(row.tokens[place]))
                owners.append(chain.sequence)
        numbers = (np.array(list_, np.int64) for list_ in (tokens, owners, wanted))
        states = in_parts(self.context.extend_states, *numbers)
        if where:
            places = torch.tensor(where)
            found[places[:, 0], places[:, 1]] = torch.from_numpy(states)


@dataclass
class _Chain:
    """Tokens [first, last) of a row, each the only child of the one before."""

    row: int
    first: int
    last: int
    parent: "_Chain | None"
    """What its first token follows; None if that is the prefix."""
    continues: bool
    """Whether it is its parent's first child, and takes the parent's sequence."""
    level: int
    """Number of chains before it on its path."""
    sequence: int = -1


def _chains(number: int, row: Row) -> list[_Chain]:
    """The chains of a row, parents first."""
    parents: list[int] = []
    path: list[int] = []
    for place in range(len(row.tokens)):
        while path and row.ends[path[-1]] <= place:
            path.pop()
        parents.append(path[-1] if path else -1)
        path.append(place)
    children = np.bincount(np.array(parents) + 1, minlength=len(parents) + 1)[1:]
    chains: list[_Chain] = []
    owner: list[_Chain] = []
    for place, before in enumerate(parents):
        if before < 0:
            chains.append(_Chain(number, place, place, None, False, 0))
        elif children[before] > 1:
            up = owner[before]
            chains.append(_Chain(number, place, place, up, before == place - 1, up.level + 1))
        chain = chains[-1] if before < 0 or children[before] > 1 else owner[before]
        chain.last = place + 1
        owner.append(chain)
    return chains


def int8_layers(raw: RawModel) -> tuple[int, int]:
    """Linear layers whose inputs are rounded to int8, and all of them, the head included."""
    head = "model.embed_tokens.weight" if raw.config.tie_word_embeddings else "lm_head.weight"
    linear = [name for name in raw.names if name.endswith("_proj.weight")]
    return len(raw.coded.intersection([*linear, head])), len(linear) + 1
