"""A model and its sequences in the native library.

model = NativeModel(shape, frequencies)
model.set("q_proj", 0, Weight(Q4_0, (576, 576), data))
context = NativeContext(model, threads=2)
sequence = context.add()
logits = context.extend([1, 2, 3], [sequence] * 3, wanted=[2])     # (1, vocabulary)
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xinslm.native import bindings
from xinslm.native.bindings import Shape, checked, floats, functions, matrix_arguments
from xinslm.native.load import free_with

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
"""llama.cpp's numbers of the types that the library reads."""
Q4_APART, Q8_APART = 100, 101
"""Codes of Q4_0 and Q8_0 with their scales in an array of their own."""
READS = {F32, F16, Q4_0, Q4_1, Q8_0, BF16}

ROLES = (
    "embedding",
    "head",
    "final_norm",
    "attention_norm",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "ffn_norm",
    "gate_proj",
    "up_proj",
    "down_proj",
    "q_proj.bias",
    "k_proj.bias",
    "v_proj.bias",
    "o_proj.bias",
    "q_norm",
    "k_norm",
)
"""Names of the weights, in the order of the C interface's numbers."""
_ROLE_NUMBERS = {name: index for index, name in enumerate(ROLES)}

MOST_LISTED = 1 << 22
"""Positions of a context whose owner sets no limit."""


@dataclass(frozen=True)
class Weight:
    """One weight as a file has it."""

    type: int
    """llama.cpp's number, or Q4_APART, Q8_APART."""
    shape: tuple[int, int]
    """Rows and columns; a vector is one row."""
    data: np.ndarray
    """Its bytes, contiguous, of any dtype."""
    scales: np.ndarray | None = None
    """Float16 (rows * columns / 32,), for the types with scales apart."""


class NativeModel:
    """Packed weights; `shape` of the C interface, `frequencies` float32 (head size / 2,)."""

    def __init__(self, shape: Shape, frequencies: np.ndarray) -> None:
        values = np.ascontiguousarray(frequencies, np.float32)
        if len(values) != shape.head_size // 2:
            raise ValueError(f"{len(values)} frequencies for heads of {shape.head_size}")
        self.shape = shape
        self._kept: list[np.ndarray] = []
        """What the library points into."""
        self.handle = checked(functions().xl_model_new(shape, floats(values)))
        free_with(self, functions().xl_model_free, self.handle)

    def set(self, role: str, layer: int, weight: Weight) -> None:
        """Copy a weight of `ROLES` in; XinslmError for a shape or type that does not fit."""
        arguments = matrix_arguments(weight.type, weight.shape, weight.data, weight.scales)
        checked(functions().xl_model_set(self.handle, layer, _ROLE_NUMBERS[role], *arguments))

    def use(self, role: str, layer: int, shape: tuple[int, int], data: np.ndarray) -> None:
        """Take a matrix from where `packed` bytes of it are, without a copy."""
        place = (data.ctypes.data, data.nbytes)
        checked(functions().xl_model_use(self.handle, layer, _ROLE_NUMBERS[role], *shape, *place))
        self._kept.append(data)

    def packed(self, role: str, layer: int) -> np.ndarray:
        """The packed bytes of a matrix, uint8, while the model lives."""
        at = ctypes.c_void_p()
        number = _ROLE_NUMBERS[role]
        size = int(checked(functions().xl_model_packed(self.handle, layer, number, at)))
        assert at.value is not None
        block = (ctypes.c_uint8 * size).from_address(at.value)
        return np.ctypeslib.as_array(block)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed matrices; XinslmError if a weight is missing."""
        return int(checked(functions().xl_model_bytes(self.handle)))


class NativeContext:
    """Sequences of tokens on a model, with their keys and values.

    Used by one thread at a time; a second one gets an XinslmError. `kernels` is one of
    `bindings.kernels()`, by default what XINSLM_KERNELS names, else the fastest.
    """

    def __init__(
        self,
        model: NativeModel,
        threads: int,
        int8_cache: bool = False,
        max_tokens: int = MOST_LISTED,
        kernels: str | None = None,
    ) -> None:
        name = bindings.forced_kernels() if kernels is None else kernels
        self.model, self.threads, lib = model, threads, functions()
        self.handle = checked(
            lib.xl_context_new(model.handle, threads, name.encode(), int(int8_cache), max_tokens)
        )
        free_with(self, lib.xl_context_free, self.handle)

    @property
    def kernels(self) -> str:
        """Name of the kernels in use."""
        name: bytes = functions().xl_context_kernels(self.handle)
        return name.decode()

    def add(self, parent: int | None = None, length: int = 0) -> int:
        """Begin a sequence, empty or with the first `length` tokens of `parent`, whose memory is
        shared; return its number.
        """
        source = -1 if parent is None else parent
        return int(checked(functions().xl_sequence_new(self.handle, source, length)))

    def remove(self, sequence: int) -> None:
        """End a sequence and free its memory."""
        checked(functions().xl_sequence_free(self.handle, sequence))

    def length(self, sequence: int) -> int:
        """Number of tokens in a sequence."""
        return int(checked(functions().xl_sequence_length(self.handle, sequence)))

    def rewind(self, sequence: int, length: int) -> int:
        """Shorten a sequence; return its length, which is 0 if a sliding window has dropped what
        the next token would see.
        """
        return int(checked(functions().xl_sequence_rewind(self.handle, sequence, length)))

    def extend(
        self, tokens: Sequence[int], sequences: Sequence[int], wanted: Sequence[int]
    ) -> np.ndarray:
        """Append tokens[i] to sequences[i], in order; return float32 logits (len(wanted),
        vocabulary) after the tokens at the rising indices `wanted`.

        A token's logits do not depend on the other tokens of the call, to the last bit.
        """
        return self._extend("xl_extend", self.model.shape.vocabulary, tokens, sequences, wanted)

    def extend_states(
        self, tokens: Sequence[int], sequences: Sequence[int], wanted: Sequence[int]
    ) -> np.ndarray:
        """As `extend`, but return the last layer's outputs, float32 (len(wanted), hidden size)."""
        width = self.model.shape.hidden_size
        return self._extend("xl_extend_states", width, tokens, sequences, wanted)

    def logits(self, states: np.ndarray) -> np.ndarray:
        """Float32 logits (rows, vocabulary) of rows of `extend_states`."""
        states = np.ascontiguousarray(states, np.float32)
        if states.ndim != 2 or states.shape[1] != self.model.shape.hidden_size:
            raise ValueError(f"states of shape {states.shape}")
        out = np.empty((len(states), self.model.shape.vocabulary), np.float32)
        checked(functions().xl_logits(self.handle, len(states), floats(states), floats(out)))
        return out

    def _extend(
        self,
        function: str,
        width: int,
        tokens: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[int],
    ) -> np.ndarray:
        ids, owners = np.array(tokens, np.int32), np.array(sequences, np.int32)
        if ids.shape != owners.shape or ids.ndim != 1:
            raise ValueError("each token needs a sequence")
        marks = np.zeros(len(ids), np.uint8)
        marks[list(wanted)] = 1
        out = np.empty((int(marks.sum()), width), np.float32)
        places = bindings.whole_numbers(ids), bindings.whole_numbers(owners)
        arguments = (len(ids), *places, bindings.flags(marks), floats(out))
        checked(getattr(functions(), function)(self.handle, *arguments))
        return out

    def cache_bytes(self, allocated: bool = False) -> int:
        """Bytes of keys and values in use, or allocated."""
        return int(checked(functions().xl_cache_bytes(self.handle, int(allocated))))


def product(weight: Weight, x: np.ndarray, kernels: str = "") -> np.ndarray:
    """Float32 (tokens, rows): x (tokens, columns) times a weight, its inputs rounded to int8 if it
    has codes; for tests.
    """
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((len(x), weight.shape[0]), np.float32)
    arguments = matrix_arguments(weight.type, weight.shape, weight.data, weight.scales)
    lib = functions()
    checked(lib.xl_product(kernels.encode(), *arguments, floats(x), len(x), floats(out)))
    return out


def decode_row(weight: Weight, row: int) -> np.ndarray:
    """Float32 (columns,): a row of a packed weight; for tests."""
    out = np.empty(weight.shape[1], np.float32)
    arguments = matrix_arguments(weight.type, weight.shape, weight.data, weight.scales)
    checked(functions().xl_decode_row(*arguments, row, floats(out)))
    return out
