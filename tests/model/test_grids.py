"""The two grids against llama.cpp's own Python reference (`gguf.quants`) and brute force."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from xinslm.model import grids
from xinslm.model.grids import (
    Q4_0,
    Q8_0,
    SMALLEST_SCALE,
    check_range,
    decode,
    encode,
    fit_scales,
    pack_nibbles,
    storable,
    to_ggml,
    unpack_nibbles,
)

KINDS = {"q4_0": GGMLQuantizationType.Q4_0, "q8_0": GGMLQuantizationType.Q8_0}


def random_weights(rows=24, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def block_errors(weight, values):
    return (weight - values).double().square().unflatten(-1, (-1, 32)).sum(-1)


@pytest.mark.parametrize("grid", [Q4_0, Q8_0], ids=lambda grid: grid.name)
def test_our_bytes_mean_the_same_to_llama_cpp(grid):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(
        grid.lowest, grid.highest + 1, (16, 96), generator=generator, dtype=torch.int8
    )
    scales = (torch.randn(16, 3, generator=generator) * 0.01).half()  # negative scales are legal
    stored = pack_nibbles(codes) if grid is Q4_0 else codes
    blocks = to_ggml(stored, scales)
    assert blocks.shape == (16, 3 * grid.block_bytes)
    theirs = gguf.quants.dequantize(blocks, KINDS[grid.name])
    assert np.array_equal(theirs, decode(codes, scales).numpy())


def test_nibble_order_is_j_and_j_plus_16():
    codes = torch.tensor([[*range(-8, 8), *([0] * 16)]], dtype=torch.int8)
    assert pack_nibbles(codes)[0].tolist() == [0x80 | value for value in range(16)]


@given(st.lists(st.integers(-8, 7), min_size=32, max_size=32))
def test_packing_round_trip(values):
    codes = torch.tensor([values], dtype=torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_q8_has_llama_cpps_scales_and_never_a_larger_error(monkeypatch):
    weight = random_weights()
    theirs = gguf.quants.quantize(weight.numpy(), KINDS["q8_0"])
    with monkeypatch.context() as patch:  # llama.cpp keeps the 11 bits of float16
        patch.setattr(grids, "storable", lambda scales: scales.half().float())
        scales = fit_scales(weight, Q8_0)
    assert np.array_equal(
        theirs.reshape(24, 4, 34)[..., :2].copy().view(np.float16)[..., 0], scales.half().numpy()
    )
    theirs = torch.from_numpy(gguf.quants.dequantize(theirs, KINDS["q8_0"]))
    ours = decode(encode(weight, scales, Q8_0), scales)
    assert (block_errors(weight, ours) <= block_errors(weight, theirs) * (1 + 1e-6)).all()
    short_scales = fit_scales(weight, Q8_0)
    short = decode(encode(weight, short_scales, Q8_0), short_scales)
    assert block_errors(weight, short).sum() < 1.01 * block_errors(weight, theirs).sum()


def test_q8_of_weights_on_the_grid_gives_llama_cpps_bytes():
    scales = torch.full((4, 2), 2.0**-7)
    codes = torch.randint(
        -127, 128, (4, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8
    )
    codes[:, ::32] = 127
    weight = decode(codes, scales)
    ours = to_ggml(encode(weight, fit_scales(weight, Q8_0), Q8_0), fit_scales(weight, Q8_0).half())
    assert np.array_equal(ours, gguf.quants.quantize(weight.numpy(), KINDS["q8_0"]))


def test_q4_search_beats_llama_cpp_and_is_near_the_best_scale_there_is():
    weight = random_weights(8, 64)
    scales = fit_scales(weight, Q4_0)
    ours = block_errors(weight, decode(encode(weight, scales, Q4_0), scales))
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(weight.numpy(), KINDS["q4_0"]), KINDS["q4_0"]
    )
    assert (ours <= block_errors(weight, torch.from_numpy(theirs)) * 1.01).all()
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    best = torch.full_like(ours, torch.inf)
    for factor in np.linspace(0.05, 0.25, 1500):
        for sign in (-1, 1):
            candidate = largest * (sign * factor)
            best = torch.minimum(
                best, block_errors(weight, decode(encode(weight, candidate, Q4_0), candidate))
            )
    assert ours.sum() < 1.02 * best.sum()


def test_importance_moves_the_scale_towards_the_columns_that_matter():
    weight = random_weights(64, 32, seed=5)
    importance = torch.ones(32)
    importance[:4] = 1000.0

    def weighted(scales):
        return ((weight - decode(encode(weight, scales, Q4_0), scales)).square() * importance).sum()

    assert weighted(fit_scales(weight, Q4_0, importance)) < 0.8 * weighted(fit_scales(weight, Q4_0))


@pytest.mark.parametrize("shape", [(3, 64), (40, 96)])
def test_q4_search_finds_the_best_of_all_its_candidates(shape, monkeypatch):
    """Against each candidate's error in float64, with two importances at once, in small chunks."""
    monkeypatch.setattr(grids, "_CHUNK_BLOCKS", 7)
    weight = random_weights(*shape, seed=2)
    weight[1] = -weight[0]
    importances = torch.rand(2, shape[1], generator=torch.Generator().manual_seed(1)) + 0.01
    blocks = weight.double().unflatten(1, (-1, 32))
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))[..., 0]

    def error(scales, importance):
        scales = scales.double()[..., None]
        left = (blocks / scales).round().clamp(-8, 7) * scales - blocks
        return (left.square() * importance.double().view(-1, 32)).sum(2)

    found = fit_scales(weight, Q4_0, importances)
    assert found.shape == (2, *extreme.shape)
    for scales, importance in zip(found, importances, strict=True):
        errors = [
            error(storable((extreme * sign / (6 + i / 10)).float()), importance)
            for i in range(41)
            for sign in (-1, 1)
        ]
        least = torch.stack(errors).amin(0)
        torch.testing.assert_close(error(scales, importance), least, rtol=1e-5, atol=0)
        assert torch.equal(scales, fit_scales(weight, Q4_0, importance))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 1e-30, 1e-8, 1e-5, 1e-3, 1.0, 1e4, 1e7]),
    st.booleans(),
)
def test_scales_are_always_storable_and_codes_belong_to_the_stored_scale(seed, magnitude, flip):
    weight = random_weights(2, 64, seed) * magnitude * (-1 if flip else 1)
    for grid in (Q4_0, Q8_0):
        scales = fit_scales(weight, grid)
        stored = scales.half()
        assert torch.equal(stored.float(), scales), "float16 holds them"
        assert torch.equal(scales.bfloat16().float(), scales), "bfloat16 holds them"
        assert torch.isfinite(stored).all() and (stored.abs() >= SMALLEST_SCALE).all()
        codes = encode(weight, scales, grid)
        assert torch.equal(codes, encode(weight, stored.float(), grid))
        if magnitude == 0.0:
            assert not codes.any()


def test_magnitudes_outside_float16_are_reported():
    weight = random_weights(4, 64)
    assert check_range(weight, Q4_0).fits and check_range(weight, Q4_0).small_blocks == 0
    assert not check_range(weight * 1e9, Q4_0).fits
    assert not check_range(weight * 1e-8, Q4_0).fits
    weight[2] *= 1e-8  # one dead row in a healthy matrix is clamped and counted
    report = check_range(weight, Q4_0)
    assert report.fits and report.small_blocks == 2
    assert check_range(torch.zeros(2, 32), Q4_0).fits
