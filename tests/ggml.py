"""llama.cpp's own functions for its blocks, called one by one in the library that `xllamacpp`
brings.
"""

import ctypes
from functools import cache

import numpy as np
import pytest

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="llama.cpp's Python package xllamacpp is not installed"
)


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    found.ggml_cpu_init()  # its table of float16 values
    return found


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Address of a contiguous array."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def q8_0_rows(x: np.ndarray, function: str = "quantize_row_q8_0") -> np.ndarray:
    """Rows of `block_q8_0`, uint8 (rows, columns / 32, 34), of float32 inputs (rows, columns)."""
    rows, columns = x.shape
    blocks = np.zeros((rows, columns // 32, 34), np.uint8)
    quantize = getattr(library(), function)
    for row, target in zip(np.ascontiguousarray(x, np.float32), blocks, strict=True):
        quantize(
            ctypes.c_void_p(row.ctypes.data),
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_int64(columns),
        )
    return blocks


def codes_of(blocks: np.ndarray) -> np.ndarray:
    """Int8 codes (rows, columns) of `q8_0_rows`."""
    return blocks[..., 2:].copy().view(np.int8).reshape(len(blocks), -1)


def scales_of(blocks: np.ndarray) -> np.ndarray:
    """Float16 scales (rows, columns / 32) of `q8_0_rows`."""
    return blocks[..., :2].copy().view("<f2")[..., 0]


def products(weights: np.ndarray, kind: str, inputs: np.ndarray) -> np.ndarray:
    """Products (inputs, weights) of `ggml_vec_dot_KIND_q8_0`, for weight rows of that kind as uint8
    (rows, bytes) and inputs of `q8_0_rows`.
    """
    dot, result = getattr(library(), f"ggml_vec_dot_{kind}_q8_0"), ctypes.c_float()
    weights, none = np.ascontiguousarray(weights), ctypes.c_size_t(0)
    columns, one = ctypes.c_int(inputs.shape[1] * 32), ctypes.c_int(1)
    found = np.zeros((len(inputs), len(weights)), np.float32)
    for i, given in enumerate(inputs):
        for j, weight in enumerate(weights):
            addresses = ctypes.c_void_p(weight.ctypes.data), ctypes.c_void_p(given.ctypes.data)
            dot(columns, ctypes.byref(result), none, addresses[0], none, addresses[1], none, one)
            found[i, j] = result.value
    return found
