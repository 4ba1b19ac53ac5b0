"""The C interface in ctypes: types of its functions, and its errors as exceptions."""

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint8, c_void_p
from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.native.load import last_error, library, reason


class Shape(ctypes.Structure):
    """`xl_shape`: a model's shape."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in (
                "layers",
                "hidden_size",
                "ffn_size",
                "heads",
                "key_heads",
                "head_size",
                "vocabulary",
                "positions",
                "window",
                "interleaved",
            )
        ),
        ("eps", c_float),
    )


class SamplingSettings(ctypes.Structure):
    """`xl_sampling`: how a token is drawn."""

    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("top_k", c_int32),
    )


_FLOATS, _TOKENS = POINTER(c_float), POINTER(c_int32)
_DATA = (c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64)
"""A matrix: type, rows, columns, bytes and their number, scales and their number."""
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "xl_kernels": (c_char_p, ()),
    "xl_model_new": (c_void_p, (POINTER(Shape), _FLOATS)),
    "xl_model_free": (None, (c_void_p,)),
    "xl_model_set": (c_int32, (c_void_p, c_int32, c_int32, *_DATA)),
    "xl_model_use": (c_int32, (c_void_p, c_int32, c_int32, c_int64, c_int64, c_void_p, c_int64)),
    "xl_model_packed": (c_int64, (c_void_p, c_int32, c_int32, POINTER(c_void_p))),
    "xl_model_bytes": (c_int64, (c_void_p,)),
    "xl_context_new": (c_void_p, (c_void_p, c_int32, c_char_p, c_int32, c_int64)),
    "xl_context_free": (None, (c_void_p,)),
    "xl_context_kernels": (c_char_p, (c_void_p,)),
    "xl_sequence_new": (c_int32, (c_void_p, c_int32, c_int64)),
    "xl_sequence_free": (c_int32, (c_void_p, c_int32)),
    "xl_sequence_length": (c_int64, (c_void_p, c_int32)),
    "xl_sequence_rewind": (c_int64, (c_void_p, c_int32, c_int64)),
    "xl_extend": (c_int32, (c_void_p, c_int32, _TOKENS, _TOKENS, POINTER(c_uint8), _FLOATS)),
    "xl_extend_states": (
        c_int32,
        (c_void_p, c_int32, _TOKENS, _TOKENS, POINTER(c_uint8), _FLOATS),
    ),
    "xl_logits": (c_int32, (c_void_p, c_int64, _FLOATS, _FLOATS)),
    "xl_cache_bytes": (c_int64, (c_void_p, c_int32)),
    "xl_sample": (
        c_int32,
        (
            *(_FLOATS, c_int32, POINTER(SamplingSettings)),
            *(_TOKENS, c_int64, c_double, POINTER(c_double)),
        ),
    ),
    "xl_product": (c_int32, (c_char_p, *_DATA, _FLOATS, c_int64, _FLOATS)),
    "xl_decode_row": (c_int32, (*_DATA, c_int64, _FLOATS)),
}


@functools.cache
def functions() -> ctypes.CDLL:
    """The library with the types of its functions set; XinslmError if there is none."""
    lib = library()
    if lib is None:
        raise XinslmError(f"the native library is not there: {reason()}")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def checked(result: Any) -> Any:
    """Return a function's result; XinslmError with the library's text if it says failure."""
    if result is None or (isinstance(result, int) and result < 0):
        raise XinslmError(last_error(functions()))
    return result


def kernels() -> list[str]:
    """Names of the kernels that this processor runs, fastest first."""
    text: bytes = functions().xl_kernels()
    return text.decode().split()


def forced_kernels() -> str:
    """The kernels that the environment's XINSLM_KERNELS names, empty for the fastest; UsageError
    for a name that this processor has no kernels of.
    """
    name, known = os.environ.get("XINSLM_KERNELS", ""), kernels()
    if name and name not in known:
        raise UsageError(f"XINSLM_KERNELS is '{name}', but must be one of {', '.join(known)}")
    return name


def floats(array: np.ndarray) -> Any:
    """Pointer to a contiguous float32 array, which must stay alive."""
    return array.ctypes.data_as(_FLOATS)


def flags(array: np.ndarray) -> Any:
    """Pointer to a contiguous uint8 array, which must stay alive."""
    return array.ctypes.data_as(POINTER(c_uint8))


def whole_numbers(array: np.ndarray) -> Any:
    """Pointer to a contiguous int32 array, which must stay alive."""
    return array.ctypes.data_as(_TOKENS)


def matrix_arguments(
    kind: int, shape: tuple[int, int], data: np.ndarray, scales: np.ndarray | None
) -> tuple[Any, ...]:
    """The arguments `_DATA` for a matrix: contiguous bytes, and float16 scales or None."""
    if not data.flags.c_contiguous or (scales is not None and not scales.flags.c_contiguous):
        raise ValueError("weights must be contiguous")
    apart = (None, 0) if scales is None else (scales.ctypes.data, scales.size)
    if scales is not None and scales.dtype != np.float16:
        raise ValueError("scales must be float16")
    return (kind, *shape, data.ctypes.data, data.nbytes, *apart)
