"""Q6_K against llama.cpp: its package and its library read the blocks, its own rounding is no
nearer to the weights.
"""

import ctypes

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from ggml import library, pointer
from xinslm.model.k_quants import Q6_K_BYTES, Q6K, SUPER_BLOCK, quantize_q6_k


def by_gguf(blocks):
    return quants.dequantize(blocks, GGMLQuantizationType.Q6_K)


def by_llama_cpp(blocks):
    values = np.zeros((len(blocks), SUPER_BLOCK), np.float32)
    blocks = np.ascontiguousarray(blocks)
    library().dequantize_row_q6_K(pointer(blocks), pointer(values), ctypes.c_int64(values.size))
    return values


def reference(values):
    """Blocks of llama.cpp's reference rounding."""
    blocks = np.zeros((len(values), Q6_K_BYTES), np.uint8)
    library().quantize_row_q6_K_ref(pointer(values), pointer(blocks), ctypes.c_int64(values.size))
    return blocks


def weights(kind, count=300):
    random = torch.Generator().manual_seed(5)
    normal = torch.randn(count, SUPER_BLOCK, generator=random)
    uniform = torch.rand(count, SUPER_BLOCK, generator=random)
    return {
        "normal": normal * 0.02,
        "one-sided": uniform * 3,
        "heavy tails": normal / (uniform + 0.05),
        "groups of all sizes": normal * 10 ** (6 * uniform[:, :16] - 4).repeat_interleave(16, 1),
        "few values": (uniform * 3).round() - 1,
    }[kind]


KINDS = ("normal", "one-sided", "heavy tails", "groups of all sizes", "few values")


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_decode_to_our_values(kind):
    found = quantize_q6_k(weights(kind))
    blocks = found.pack()
    assert blocks.shape == (300, Q6_K_BYTES)
    assert np.array_equal(by_gguf(blocks), found.decode().numpy())
    assert np.array_equal(by_llama_cpp(blocks), found.decode().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_below_that_of_the_reference(kind):
    x = weights(kind).numpy()
    errors = [
        np.square(by_gguf(blocks).astype(np.float64) - x).sum(1)
        for blocks in (quantize_q6_k(torch.from_numpy(x)).pack(), reference(x))
    ]
    tiny = 1e-7 * np.square(x).sum(1)  # "few values": both are all but exact
    assert errors[0].sum() <= 0.95 * errors[1].sum() + tiny.sum()
    assert (errors[0] <= errors[1] + tiny).mean() > 0.98


def test_any_codes_and_scales_survive_packing():
    """Signs, the ends of both ranges, and which bits lie where."""
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (64, Q6_K_BYTES), dtype=np.uint8)
    blocks[:, -2:] = np.full((64, 1), 0.5, "<f2").view(np.uint8)
    values = torch.from_numpy(by_gguf(blocks))
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    codes = values.view(64, 16, 16).numpy() / np.where(scales == 0, 1, scales)[..., None] / 0.5
    again = Q6K(
        torch.from_numpy(codes.astype(np.int8)),
        torch.from_numpy(scales.astype(np.int8)),
        torch.full((64,), 0.5, dtype=torch.float16),
    )
    used = np.repeat(scales != 0, 16, axis=1)
    assert np.array_equal(by_gguf(again.pack())[used], values.numpy()[used])
    assert np.array_equal(again.decode().numpy()[used], values.numpy()[used])


def test_zeros_and_what_has_no_scale():
    zeros = torch.zeros(2, SUPER_BLOCK)
    zeros[1, 5] = -3.0
    found = quantize_q6_k(zeros).decode()
    assert torch.equal(found[0], zeros[0]) and found[1, 5] == pytest.approx(-3, rel=1e-3)
    assert (found[1].abs() > 1e-6).sum() == 1
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_q6_k(zeros / 0)
    with pytest.raises(ValueError, match="no float16 scale"):
        quantize_q6_k(torch.full((1, SUPER_BLOCK), 1e20))
