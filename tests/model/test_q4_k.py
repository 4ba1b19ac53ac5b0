"""Q4_K against llama.cpp (its package, its library, its own rounding) and against the layout
written out byte by byte.
"""

import ctypes

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from ggml import library, pointer
from xinslm.model.grids import Q5_0, decode, encode, fit_scales, pack_q5_0, to_ggml
from xinslm.model.q4_k import Q4_K, Q4_K_BYTES, Q4K, SUPER_BLOCK, fit_q4_k


def by_gguf(blocks, kind=GGMLQuantizationType.Q4_K):
    return quants.dequantize(blocks, kind)


def by_llama_cpp(blocks):
    values = np.zeros((len(blocks), blocks.shape[1] // Q4_K_BYTES * SUPER_BLOCK), np.float32)
    blocks = np.ascontiguousarray(blocks)
    library().dequantize_row_q4_K(pointer(blocks), pointer(values), ctypes.c_int64(values.size))
    return values


def reference(values, importance=None):
    """Values of llama.cpp's own rounding, with its importance matrix or without."""
    rows, columns = values.shape
    blocks = np.zeros((rows, columns // SUPER_BLOCK * Q4_K_BYTES), np.uint8)
    library().ggml_quantize_chunk.restype = ctypes.c_size_t
    library().ggml_quantize_chunk(
        ctypes.c_int(GGMLQuantizationType.Q4_K),
        pointer(values),
        pointer(blocks),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None if importance is None else pointer(importance),
    )
    return by_gguf(blocks)


def by_definition(weight):
    """The blocks of `Q4K`, one number after another, by the comments of ggml-quants.c."""
    out = bytearray()
    for row in range(len(weight.codes)):
        for block in range(weight.d.shape[1]):
            scales = weight.scales[row, 8 * block : 8 * block + 8].tolist()
            minimums = weight.minimums[row, 8 * block : 8 * block + 8].tolist()
            codes = weight.codes[row, 256 * block : 256 * block + 256].tolist()
            out += np.array([weight.d[row, block], weight.dmin[row, block]], "<f2").tobytes()
            bits = [0] * 12
            for j in range(8):
                if j < 4:
                    bits[j] |= scales[j]
                    bits[j + 4] |= minimums[j]
                else:
                    bits[j + 4] |= (scales[j] & 0xF) | ((minimums[j] & 0xF) << 4)
                    bits[j - 4] |= (scales[j] >> 4) << 6
                    bits[j] |= (minimums[j] >> 4) << 6
            out += bytes(bits)
            for pair in range(4):
                for j in range(32):
                    out.append(codes[64 * pair + j] | codes[64 * pair + 32 + j] << 4)
    return np.frombuffer(bytes(out), np.uint8).reshape(len(weight.codes), -1)


def random_weight(rows=5, supers=3, seed=0):
    random = np.random.default_rng(seed)

    def integers(low, high, columns, kind):
        return torch.from_numpy(random.integers(low, high, (rows, columns)).astype(kind))

    halves = random.normal(size=(2, rows, supers)).astype(np.float16)
    return Q4K(
        integers(0, 16, 256 * supers, np.int8),
        integers(1, 64, 8 * supers, np.uint8),
        integers(0, 64, 8 * supers, np.uint8),
        *(torch.from_numpy(half) for half in abs(halves)),
    )


def weights(kind, rows=40, columns=512):
    random = torch.Generator().manual_seed(5)
    normal = torch.randn(rows, columns, generator=random)
    uniform = torch.rand(rows, columns, generator=random)
    return {
        "normal": normal * 0.02,
        "one-sided": uniform * 3,
        "negative only": -uniform - 0.5,
        "heavy tails": normal / (uniform + 0.05),
        "blocks of all sizes": normal
        * 10 ** (4 * uniform[:, :16] - 4).repeat_interleave(columns // 16, 1),
        "huge": normal * 1e5,
        "tiny": normal * 1e-5,
    }[kind]


KINDS = (
    "normal",
    "one-sided",
    "negative only",
    "heavy tails",
    "blocks of all sizes",
    "huge",
    "tiny",
)


def test_any_codes_and_scales_are_packed_as_the_definition_says():
    for seed in range(4):
        weight = random_weight(seed=seed)
        blocks = weight.pack()
        assert np.array_equal(blocks, by_definition(weight))
        assert np.array_equal(by_gguf(blocks), weight.decode().numpy())


def test_the_ends_of_all_ranges_survive_packing():
    ones = torch.ones(1, 8, dtype=torch.uint8)
    half = torch.tensor([[65504.0]], dtype=torch.float16)
    for code in (0, 15):
        for scale in (1, 15, 16, 63):
            for minimum in (0, 15, 16, 63):
                codes = torch.full((1, 256), code, dtype=torch.int8)
                weight = Q4K(codes, ones * scale, ones * minimum, half, half)
                assert np.array_equal(by_gguf(weight.pack()), weight.decode().numpy())
                assert weight.decode()[0, 0] == 65504.0 * (code * scale - minimum)


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_decode_to_our_values(kind):
    found = fit_q4_k(weights(kind))
    blocks = found.pack()
    assert blocks.shape == (40, 2 * Q4_K_BYTES)
    assert np.array_equal(by_gguf(blocks), found.decode().numpy())
    # llama.cpp's library may fuse the product with the subtraction
    steps = found.steps.repeat_interleave(32, 1).numpy()
    assert (np.abs(by_llama_cpp(blocks) - found.decode().numpy()) <= 1e-5 * steps).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_code_is_the_nearest_of_its_block(kind):
    weight, found = weights(kind), fit_q4_k(weights(kind))
    codes = torch.arange(16).float()
    levels = found.steps[..., None] * codes - found.offsets[..., None]
    blocks = weight.unflatten(1, (-1, 32))
    best = (blocks[..., None] - levels[..., None, :]).abs().amin(-1)
    error = (blocks - found.decode().unflatten(1, (-1, 32))).abs()
    assert (error <= best + 1e-5 * found.steps[..., None]).all()
    assert (found.scales >= 1).all() and (found.scales <= 63).all() and (found.minimums <= 63).all()
    assert found.codes.min() >= Q4_K.lowest and found.codes.max() <= Q4_K.highest


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "one-sided", "heavy tails", "blocks of all sizes"])
def test_the_error_is_below_that_of_llama_cpp(kind, is_weighted):
    x = weights(kind)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 3 + 0.01
    given = importance if is_weighted else None
    columns = importance if is_weighted else torch.ones(512)
    ours = fit_q4_k(x, given).decode()
    theirs = torch.from_numpy(reference(x.numpy(), None if given is None else given.numpy()))
    errors = [((found - x).double().square() * columns).sum() for found in (ours, theirs)]
    assert 0.5 * errors[1] < errors[0] < 0.995 * errors[1]


def test_extreme_blocks():
    x = torch.zeros(6, 256)
    x[1, 77] = -3.0  # one outlier
    x[2] = 0.7  # all equal
    x[3] = -0.7
    x[4, :32], x[4, 32:] = 1e4, 1e-4
    x[5, ::2], x[5, 1::2] = -1.0, 1.0
    found = fit_q4_k(x).decode()
    assert torch.equal(found[0], x[0])
    assert (found - x)[[1, 2, 3, 5]].abs().max() < 2e-3
    assert (found[1] != 0).sum() == 1
    assert (found[4, :32] - 1e4).abs().max() < 1e-3 * 1e4 and (found[4, 32:] >= 0).all()
    assert np.array_equal(by_gguf(fit_q4_k(x).pack()), found.numpy())


def test_what_has_no_scale_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_q4_k(torch.full((1, 256), torch.nan))
    for value in (1e20, -1e20, 7e7):
        with pytest.raises(ValueError, match="no float16 scale"):
            fit_q4_k(torch.full((1, 256), value))
    assert fit_q4_k(torch.full((1, 256), 5e7)).decode().sub(5e7).abs().max() < 1e5


def test_importance_moves_the_error_to_other_columns():
    x = weights("normal")
    importance = torch.where(torch.arange(512) % 8 == 0, 100.0, 1.0)
    even, weighted = fit_q4_k(x).decode(), fit_q4_k(x, importance).decode()
    errors = [(found - x)[:, ::8].square().sum() for found in (weighted, even)]
    assert errors[0] < 0.8 * errors[1]


def test_q5_0_blocks_decode_to_our_values_with_less_error_than_the_reference():
    for kind in ("normal", "one-sided", "heavy tails"):
        x = weights(kind)
        scales = fit_scales(x, Q5_0)
        codes = encode(x, scales, Q5_0)
        assert codes.min() >= -16 and codes.max() <= 15
        blocks = to_ggml(pack_q5_0(codes), scales.half())
        q5_0 = GGMLQuantizationType.Q5_0
        assert np.array_equal(by_gguf(blocks, q5_0), decode(codes, scales).numpy())
        theirs = by_gguf(quants.quantize(x.numpy(), q5_0), q5_0)
        ours = decode(codes, scales)
        assert (ours - x).square().sum() < 0.97 * (torch.from_numpy(theirs) - x).square().sum()
