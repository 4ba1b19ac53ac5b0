"""BPE in the native library: texts to ids in numpy arrays, ids to bytes, learning of merges.

    encoder = NativeEncoder.make(vocabulary)
    ids, offsets = encoder.encode(["Once upon a time"], Search.ADDED, threads=2)

The package `tokenizer` has the twins in Python that define the results. Calls release the GIL.
"""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, pairwise
from typing import Any

import numpy as np

from xinslm.errors import XinslmError
from xinslm.native.load import free_with, last_error, library

RULES = {"llama-bpe": 0, "gpt-2": 1, "qwen2": 2, "smollm": 3}
"""Split rules that the library has scanners for, by llama.cpp's names."""
_BATCH_BYTES = 1 << 24
_TEXTS = (POINTER(c_char_p), POINTER(c_int64), c_int64)
_STRINGS = (c_char_p, c_int64, c_void_p)
_SIGNATURES = {
    "new": (
        c_void_p,
        (*_STRINGS, c_void_p, c_int64, *_STRINGS, c_int64, c_int32, c_int32, c_int64),
    ),
    "of_gguf": (
        c_void_p,
        (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int32, c_int32),
    ),
    "add_token": (c_int32, (c_void_p, c_char_p, c_int64, c_uint32, c_int32)),
    "ready": (c_int32, (c_void_p,)),
    "free": (None, (c_void_p,)),
    "capacity": (c_int64, (c_int64,)),
    "encode": (
        c_int64,
        (c_void_p, *_TEXTS, c_int32, c_int32, c_int32, c_void_p, c_int64, c_void_p),
    ),
    "encode_piece": (c_int64, (c_void_p, c_char_p, c_int64, c_void_p, c_int64)),
    "decode": (c_int64, (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int64)),
    "tokens": (c_int64, (c_void_p, POINTER(c_void_p), POINTER(c_void_p))),
    "learner_new": (c_void_p, (c_int32,)),
    "learner_free": (None, (c_void_p,)),
    "learner_texts": (c_int32, (c_void_p, *_TEXTS, c_int32)),
    "learner_piece": (c_int32, (c_void_p, c_char_p, c_int64, c_int64)),
    "learner_start": (c_int64, (c_void_p, c_int64, c_int64)),
    "learner_run": (c_int64, (c_void_p, c_int64)),
    "learner_merges": (c_int64, (c_void_p, c_void_p, c_int64)),
}


class Search(IntEnum):
    """Tokens that a text is searched for before it is split."""

    NONE = 0
    ADDED = 1
    """Those that are not control tokens."""
    ALL = 2


@dataclass(frozen=True)
class Vocabulary:
    """What an encoder is made from."""

    tokens: dict[str, int]
    """Tokens in the byte alphabet, to ids."""
    merges: Sequence[tuple[str, str]]
    ignore_merges: bool
    split: str
    """llama.cpp's name of the split rule, one of `RULES`."""
    added: dict[str, int]
    special: dict[str, int]
    vocab_size: int


@functools.cache
def _declare(lib: ctypes.CDLL) -> None:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, f"xl_bpe_{name}")
        function.restype, function.argtypes = result, arguments


def bpe_library() -> ctypes.CDLL | None:
    """Return the library with the types of BPE's functions declared, or None."""
    lib = library()
    if lib is not None:
        _declare(lib)
    return lib


class NativeEncoder:
    """Encodes and decodes with one vocabulary; several threads can use it at once."""

    def __init__(self, lib: ctypes.CDLL, vocabulary: Vocabulary):
        """Build the tables; XinslmError if the vocabulary contradicts itself."""
        tokens, ids = _joined(vocabulary.tokens), list(vocabulary.tokens.values())
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary.vocab_size < 1 << 32:
            raise XinslmError(f"the vocabulary has ids outside 0..{vocabulary.vocab_size - 1}")
        parts = list(chain.from_iterable(vocabulary.merges))
        merges = _joined(parts)
        lengths, merge_lengths = _lengths(vocabulary.tokens), _lengths(parts)
        numbers = np.array(ids, np.uint32)
        handle = lib.xl_bpe_new(
            *(tokens, len(tokens), lengths.ctypes.data, numbers.ctypes.data, len(ids)),
            *(merges, len(merges), merge_lengths.ctypes.data, len(parts) // 2),
            *(vocabulary.ignore_merges, RULES[vocabulary.split], vocabulary.vocab_size),
        )
        self._own(lib, handle, vocabulary.vocab_size)
        # of equal contents the control token counts, which comes first
        added = {c: i for c, i in vocabulary.added.items() if c not in vocabulary.special}
        for content, index, is_special in (
            *((content, index, True) for content, index in vocabulary.special.items()),
            *((content, index, False) for content, index in added.items()),
        ):
            data = content.encode("utf-8", "surrogatepass")
            _check(lib, lib.xl_bpe_add_token(self._handle, data, len(data), index, is_special))
        _check(lib, lib.xl_bpe_ready(self._handle))

    @classmethod
    def make(cls, vocabulary: Vocabulary) -> "NativeEncoder | None":
        """Return an encoder, or None if there is no library or no scanner for the split rule."""
        lib = bpe_library() if vocabulary.split in RULES else None
        return None if lib is None else cls(lib, vocabulary)

    def _own(self, lib: ctypes.CDLL, handle: int | None, vocab_size: int) -> None:
        _check(lib, handle or -1)
        self._lib, self._handle = lib, c_void_p(handle)
        free_with(self, lib.xl_bpe_free, self._handle)
        self._id_type: type[np.uint16] | type[np.uint32] = (
            np.uint16 if vocab_size <= 65_536 else np.uint32
        )

    @classmethod
    def of_gguf(
        cls, tokens: np.ndarray, kinds: np.ndarray, merges: tuple[np.ndarray, int], split: str
    ) -> "NativeEncoder | None":
        """Return an encoder from a GGUF file's arrays as they are: bytes of the tokens, int32
        kinds, bytes of the merges and their number. None if that takes the code in Python.
        """
        lib = bpe_library() if split in RULES else None
        if lib is None:
            return None
        kinds = np.ascontiguousarray(kinds, np.int32)
        text, num_merges = merges
        handle = lib.xl_bpe_of_gguf(
            *(tokens.ctypes.data, tokens.nbytes, kinds.ctypes.data, len(kinds)),
            *(text.ctypes.data, text.nbytes, num_merges, split == "llama-bpe", RULES[split]),
        )
        if not handle:
            return None
        made = cls.__new__(cls)
        used = np.flatnonzero(np.isin(kinds, (1, 3, 4)))
        made._own(lib, handle, int(used[-1]) + 1)
        return made

    def encode(
        self, texts: Sequence[str], search: Search, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts into flat ids (uint16, or uint32 above 65,536) and int64 offsets (n + 1).

        UnicodeEncodeError if a text has lone surrogates.
        """
        data, sizes, total = _packed([text.encode() for text in texts])
        ids = np.empty(self._lib.xl_bpe_capacity(total), self._id_type)
        offsets = np.empty(len(texts) + 1, np.int64)
        count = self._lib.xl_bpe_encode(
            *(self._handle, data, sizes, len(texts), threads, search, ids.itemsize),
            *(ids.ctypes.data, len(ids), offsets.ctypes.data),
        )
        _check(self._lib, count)
        ids.resize(count, refcheck=False)  # gives the unused memory back
        return ids, offsets

    def encode_piece(self, piece: bytes) -> list[int]:
        """Return the ids of bytes as one piece: merges only, no split."""
        ids = (c_uint32 * max(len(piece), 1))()
        count = self._lib.xl_bpe_encode_piece(self._handle, piece, len(piece), ids, len(ids))
        return ids[: _check(self._lib, count)]

    def decode(self, ids: np.ndarray, skip_special: bool) -> bytes:
        """Return the bytes of int64 ids; XinslmError for an id that is not in the vocabulary."""
        ids = np.ascontiguousarray(ids, np.int64)
        room = 8 * len(ids)
        while True:
            out = np.empty(room, np.uint8)
            size = self._lib.xl_bpe_decode(
                self._handle, ids.ctypes.data, len(ids), skip_special, out.ctypes.data, room
            )
            if _check(self._lib, size) <= room:
                return out[:size].tobytes()
            room = size

    def bytes_of_tokens(self) -> list[bytes]:
        """Return the bytes of each id; empty for an id that no token has."""
        data, offsets, count = self._bytes
        edges = offsets[: count + 1]
        joined = ctypes.string_at(data, edges[-1]) if edges[-1] else b""
        return [joined[begin:end] for begin, end in pairwise(edges)]

    def bytes_of_token(self, token: int) -> bytes:
        """Return the bytes of one id below the vocabulary's size."""
        data, offsets, _ = self._bytes
        begin, end = offsets[token], offsets[token + 1]
        return ctypes.string_at(data + begin, end - begin) if end > begin else b""

    @functools.cached_property
    def _bytes(self) -> tuple[int, Any, int]:
        """Address of the bytes of all tokens, where each begins, and how many there are."""
        data, offsets = c_void_p(), c_void_p()
        count = self._lib.xl_bpe_tokens(self._handle, byref(data), byref(offsets))
        _check(self._lib, count)
        return data.value or 0, ctypes.cast(offsets, POINTER(c_uint32)), count


class NativeLearner:
    """Counts distinct pieces, then learns merges; for one thread of Python at a time."""

    def __init__(self, lib: ctypes.CDLL, split: str, threads: int):
        """`threads` is the number that counts pieces."""
        self._lib, self._threads = lib, threads
        handle = lib.xl_bpe_learner_new(RULES[split])
        _check(lib, handle or -1)
        self._handle = c_void_p(handle)
        free_with(self, lib.xl_bpe_learner_free, self._handle)
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    @classmethod
    def make(cls, split: str, threads: int) -> "NativeLearner | None":
        """Return a learner, or None if there is no library or no scanner for the split rule."""
        lib = bpe_library() if split in RULES else None
        return None if lib is None else cls(lib, split, threads)

    def add_text(self, text: str) -> None:
        """Count the pieces of a text; UnicodeEncodeError if it has lone surrogates."""
        self._waiting.append(text.encode())
        self._waiting_bytes += len(self._waiting[-1])
        if self._waiting_bytes >= _BATCH_BYTES:
            self._count()

    def add_piece(self, piece: bytes, count: int) -> None:
        """Count one piece that was found elsewhere."""
        size = len(piece)
        _check(self._lib, self._lib.xl_bpe_learner_piece(self._handle, piece, size, count))

    def start(self, min_frequency: int, max_token_length: int | None) -> int:
        """End counting; return the number of distinct pieces."""
        self._count()
        longest = max_token_length or 0
        found = self._lib.xl_bpe_learner_start(self._handle, min_frequency, longest)
        return _check(self._lib, found)

    def run(self, num_tokens: int) -> int:
        """Learn until there are `num_tokens` tokens or no pair is left; return how many there are.

        The 256 bytes count as tokens; they have the first ids, in the order of the byte alphabet.
        """
        return _check(self._lib, self._lib.xl_bpe_learner_run(self._handle, num_tokens))

    def merges(self) -> np.ndarray:
        """Return the merges as ids, (merges, 2) uint32."""
        count = _check(self._lib, self._lib.xl_bpe_learner_merges(self._handle, None, 0))
        pairs = np.empty((count, 2), np.uint32)
        self._lib.xl_bpe_learner_merges(self._handle, pairs.ctypes.data, pairs.size)
        return pairs

    def _count(self) -> None:
        data, sizes, _ = _packed(self._waiting)
        done = self._lib.xl_bpe_learner_texts(
            self._handle, data, sizes, len(self._waiting), self._threads
        )
        self._waiting, self._waiting_bytes = [], 0
        _check(self._lib, done)


def _packed(texts: list[bytes]) -> tuple[ctypes.Array, ctypes.Array, int]:
    """Return pointers to texts and their sizes, and the sum of the sizes; nothing is copied."""
    sizes = [len(text) for text in texts]
    return (c_char_p * len(texts))(*texts), (c_int64 * len(texts))(*sizes), sum(sizes)


def _joined(strings: Iterable[str]) -> bytes:
    return "".join(strings).encode("utf-8", "surrogatepass")


def _lengths(strings: Iterable[str]) -> np.ndarray:
    return np.array([len(string) for string in strings], np.uint32)


def _check(lib: ctypes.CDLL, result: int) -> int:
    """Return the result of a call; XinslmError if it failed."""
    if result < 0:
        raise XinslmError(last_error(lib))
    return result
