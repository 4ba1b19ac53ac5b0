"""Many texts at once in the native library, for what writes batches.

batch = NativeBatch(with_8_bit_weights(raw), vocab_size=49152)
generate_batch(batch.open_decoder, prompts, keys, sampling, limits)
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from xinslm.inference.native_engine import CHUNK, build, matrix_shapes, role_of
from xinslm.inference.raw_weights import RawModel
from xinslm.machine import usable_cores
from xinslm.model.grids import BLOCK, Q8_0, check_range, encode, fit_scales
from xinslm.native.model import BF16, F16, F32, Q8_APART, NativeContext, Weight

_FLOATS = (F32, F16, BF16)
_ROUNDED = 1 << 20
"""Weights that are rounded at once."""


class NativeDecoder:
    """A `Decoder` of `teachers/generate.py` on the native library."""

    refills = True

    def __init__(self, context: NativeContext, rows: int, vocab_size: int, most: int) -> None:
        """`most`: tokens that the model reads of a text."""
        self.context, self.vocab_size, self.most = context, vocab_size, most
        self.token_forwards = 0
        self.sequences = [context.add() for _ in range(rows)]
        weakref.finalize(self, remove_all, context, self.sequences)

    def read(self, rows: Sequence[int], prompts: Sequence[np.ndarray]) -> tuple[Tensor, np.ndarray]:
        """Read prompts into rows, whole, what they all begin with once; return the next logits
        (n, V) and the prompts' lengths.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        shared = _shared(prompts) if len(prompts) > 1 else 0
        beginning = self.context.add()
        try:
            if shared:
                self._extend(prompts[0][:shared], np.full(shared, beginning), np.zeros(0, np.int64))
            for row in rows:
                self.context.remove(self.sequences[row])
                self.sequences[row] = self.context.add(beginning, shared)
        finally:
            self.context.remove(beginning)
        owners = np.repeat([self.sequences[row] for row in rows], lengths - shared)
        tokens = np.concatenate([prompt[shared:] for prompt in prompts])
        return self._extend(tokens, owners, (lengths - shared).cumsum() - 1), lengths

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, (B,); return the next logits (B, V)."""
        for sequence in self.sequences:  # a row whose text has ended may be full
            if self.context.length(sequence) >= self.most:
                self.context.rewind(sequence, self.most - 1)
        return self._extend(tokens.numpy(), np.array(self.sequences), np.arange(len(tokens)))

    def keep(self, rows: np.ndarray) -> None:
        """Keep only these rows, in this order."""
        kept = [self.sequences[row] for row in rows]
        remove_all(self.context, [number for number in self.sequences if number not in set(kept)])
        self.sequences[:] = kept

    def _extend(self, tokens: np.ndarray, owners: np.ndarray, wanted: np.ndarray) -> Tensor:
        self.token_forwards += len(tokens)
        logits = in_parts(self.context.extend, tokens, owners, wanted)
        return torch.from_numpy(logits)[:, : self.vocab_size]


class NativeBatch:
    """A model of which many texts are written at once."""

    def __init__(self, raw: RawModel, vocab_size: int) -> None:
        """`vocab_size`: tokens to choose from; the model may have more rows."""
        config = raw.config
        self.vocab_size = vocab_size
        self.max_length = config.max_position_embeddings
        self.cache_bytes_per_token = kept_bytes(raw)
        """Bytes of a token's keys and values, in float16."""
        threads = usable_cores()
        self.context = NativeContext(build(raw, threads), threads)

    def open_decoder(self, rows: int, length: int) -> NativeDecoder:
        """Room for `rows` texts; it grows with them."""
        return NativeDecoder(self.context, rows, self.vocab_size, self.max_length)


def kept_bytes(raw: RawModel) -> int:
    """Bytes of a token's keys and values, in float16."""
    config = raw.config
    return config.num_hidden_layers * 2 * 2 * config.num_key_value_heads * config.head_dim


def with_8_bit_weights(raw: RawModel) -> RawModel:
    """The model with each float matrix rounded to Q8_0 when it is read, so that its products are of
    integers. A matrix that the grid does not fit stays as it is: rows that are no multiple of 32
    long, or magnitudes beyond the scales.
    """
    matrices = matrix_shapes(raw.config)

    def read(name: str) -> Weight:
        weight = raw.read(name)
        if role_of(name)[0] not in matrices or weight.type not in _FLOATS:
            return weight
        return (weight.shape[1] % BLOCK == 0 and to_q8(weight)) or weight

    return replace(raw, read=read)


def to_q8(weight: Weight) -> Weight | None:
    """A float matrix on the grid Q8_0 (`model/grids.py`); None if its scales do not reach."""
    rows, columns = weight.shape
    data = np.ascontiguousarray(weight.data).reshape(-1).view(np.uint8).reshape(rows, -1)
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // BLOCK), np.float16)
    step = max(1, _ROUNDED // columns)
    for at in range(0, rows, step):
        part = _values(data[at : at + step], weight.type)
        if not check_range(part, Q8_0).fits:
            return None
        fitted = fit_scales(part, Q8_0)
        codes[at : at + step] = encode(part, fitted, Q8_0).numpy()
        scales[at : at + step] = fitted.numpy()
    return Weight(Q8_APART, (rows, columns), codes.reshape(-1), scales.reshape(-1))


def _values(rows: np.ndarray, kind: int) -> Tensor:
    """Float32 values of rows of bytes."""
    dtype = {F32: np.float32, F16: np.float16, BF16: np.uint16}[kind]
    values = rows.view(dtype)
    if kind == BF16:
        return torch.from_numpy((values.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(values.astype(np.float32))


def in_parts(
    extend: Callable[..., np.ndarray], tokens: np.ndarray, owners: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """What `extend` gives for the rising indices `wanted`, in calls that Ctrl-C does not wait for
    long.
    """
    parts = []
    for at in range(0, len(tokens), CHUNK):
        chosen = wanted[(wanted >= at) & (wanted < at + CHUNK)] - at
        part = slice(at, at + CHUNK)
        parts.append(extend(tokens[part].tolist(), owners[part].tolist(), chosen.tolist()))
    return np.concatenate(parts)


def _shared(prompts: Sequence[np.ndarray]) -> int:
    """Number of first tokens that all prompts share, less than any has."""
    least = min(map(len, prompts)) - 1
    first = np.asarray(prompts[0][:least])
    same = np.all([first == prompt[:least] for prompt in prompts], axis=0)
    return least if same.all() else int(same.argmin())


def remove_all(context: NativeContext, sequences: list[int]) -> None:
    """End sequences and free their memory."""
    for number in sequences:
        context.remove(number)
