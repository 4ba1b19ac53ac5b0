"""Every set of kernels that this processor runs against NumPy in integers and float64, and against
the scalar set bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from small_models import FAMILIES, save_quantized, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.inference.config import NativeConfig
from xinslm.inference.native_engine import build
from xinslm.inference.native_info import run as native_info
from xinslm.inference.raw_weights import open_raw
from xinslm.native import library
from xinslm.native.bindings import kernels
from xinslm.native.model import (
    BF16,
    F16,
    F32,
    Q4_0,
    Q4_1,
    Q4_APART,
    Q8_0,
    Q8_APART,
    NativeContext,
    Weight,
    decode_row,
    product,
)

SETS = kernels() if library() is not None else []
KINDS = {
    "Q4_0": Q4_0,
    "Q4_1": Q4_1,
    "Q8_0": Q8_0,
    "Q4 apart": Q4_APART,
    "Q8 apart": Q8_APART,
    "F16": F16,
    "F32": F32,
    "BF16": BF16,
}
SHAPES = [(1, 32), (15, 96), (17, 32), (33, 576), (16, 96)]
SPECIAL_HALVES = np.array([0, 0x8000, 1, 0x83FF, 0x03FF, 0x7BFF], np.uint16).view(np.float16)


@dataclass
class Case:
    """A weight, and what its bytes mean."""

    weight: Weight
    codes: np.ndarray | None = None
    """Integers (rows, blocks, 32), without an offset for Q4_1."""
    scales: np.ndarray | None = None
    """Float64 (rows, blocks)."""
    minima: np.ndarray | None = None
    values: np.ndarray | None = None
    """Float64 (rows, columns) of a float type."""

    def decoded(self) -> np.ndarray:
        """Float32 (rows, columns)."""
        if self.values is not None:
            return self.values.astype(np.float32)
        parts = self.codes * self.scales[..., None]
        if self.minima is not None:
            parts = parts.astype(np.float32) + self.minima[..., None].astype(np.float32)
        return parts.astype(np.float32).reshape(len(parts), -1)


def scales_of(rng: np.random.Generator, shape: tuple[int, int], special: bool) -> np.ndarray:
    if special:
        return rng.choice(SPECIAL_HALVES, shape)
    return rng.normal(0, 0.01, shape).astype(np.float16)


def halves_joined(stored: np.ndarray) -> np.ndarray:
    """4-bit numbers (..., 32) as bytes (..., 16): column j low, column 16 + j high."""
    return (stored[..., :16] | stored[..., 16:] << 4).astype(np.uint8)


def make(name: str, rows: int, columns: int, seed: int, fill: str = "random") -> Case:
    """A weight whose codes are random or all the largest (`full`), its scales at float16's edges
    for `special`.
    """
    rng, kind = np.random.default_rng(seed), KINDS[name]
    special = fill == "special"
    if kind in (F16, F32, BF16):
        return make_floats(rng, kind, rows, columns, special)
    shape = rows, columns // 32
    scales = scales_of(rng, shape, special)
    minima = scales_of(rng, shape, special) if kind == Q4_1 else None
    if kind in (Q8_0, Q8_APART):
        codes = rng.integers(-128, 128, (*shape, 32))
        codes = np.full_like(codes, -128) if fill == "full" else codes
        stored = codes.astype(np.int8).view(np.uint8)
    else:
        codes = rng.integers(0, 16, (*shape, 32))
        codes = np.full_like(codes, 15) if fill == "full" else codes
        stored = halves_joined(codes)
        codes = codes if kind == Q4_1 else codes - 8
    heads = [
        part.view(np.uint8).reshape(*shape, 2) for part in (scales, minima) if part is not None
    ]
    if kind in (Q4_APART, Q8_APART):
        weight = Weight(kind, (rows, columns), np.ascontiguousarray(stored), scales.reshape(-1))
    else:
        weight = Weight(kind, (rows, columns), np.concatenate([*heads, stored], axis=-1))
    wide = [None if part is None else part.astype(np.float64) for part in (scales, minima)]
    return Case(weight, codes, *wide)


def make_floats(
    rng: np.random.Generator, kind: int, rows: int, columns: int, special: bool
) -> Case:
    values = rng.normal(0, 0.05, (rows, columns)).astype(np.float32)
    if special:
        values = rng.choice(np.float32([0, -0.0, 1e-40, 6e-8, -1e-6, 60000.0]), (rows, columns))
    if kind == BF16:
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = values.astype(np.float16) if kind == F16 else values
        values = stored.astype(np.float32)
    return Case(Weight(kind, (rows, columns), stored), values=values.astype(np.float64))


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 (tokens, blocks, 32) and scales float64 (tokens, blocks) of inputs: llama.cpp's
    Q8_0 as it rounds on x86. A block with NaN or an infinite input has the scale NaN.
    """
    blocks = x.reshape(len(x), -1, 32)
    finite = np.isfinite(blocks).all(-1)
    largest = np.where(finite, np.abs(blocks).max(-1), 0).astype(np.float32)
    scales = (largest / np.float32(127)).astype(np.float16)
    factors = np.float32(127) / np.where(largest == 0, np.float32(1), largest)
    used = finite & (scales != 0)
    codes = np.where(used[..., None], blocks, 0) * np.where(used, factors, 0)[..., None]
    wide = np.where(finite, scales.astype(np.float64), np.nan)
    return np.rint(codes.astype(np.float32)).astype(np.int64), wide


def rounding(terms: np.ndarray) -> np.ndarray:
    """Bound of what float32 sums of the last axis lose: 2^-24 of each sum, or half of the smallest
    subnormal number.
    """
    return (terms.shape[-1] + 1) * (2.0**-24 * np.abs(terms).sum(-1) + 2.0**-150)


def expected(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 outputs (tokens, rows), and the bound of float32's rounding."""
    if case.values is not None:
        terms = x.astype(np.float64)[:, None, :] * case.values
        return terms.sum(-1), rounding(terms)
    codes, steps = rounded(x)
    dots = np.einsum("tbi,rbi->trb", codes, case.codes)
    terms = dots * (steps[:, None, :] * case.scales)
    if case.minima is not None:
        along = steps[:, None, :] * codes.sum(-1)[:, None, :] * case.minima
        terms = np.concatenate([terms, along], axis=-1)
    return terms.sum(-1), rounding(terms)


def inputs(name: str, tokens: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(columns)
    x = rng.normal(0, 1, (tokens, columns)).astype(np.float32)
    if name == "zeros":
        x = np.zeros_like(x)
        x[:, 1::2] = -0.0
    if name in ("1e-40", "1e30"):
        x *= np.float32(name)
    if name == "largest codes":
        x = rng.choice(np.float32([-127, 127]), x.shape)
    if name == "equal signs":
        x = np.full_like(x, 127)
    if name == "ties":
        x = rng.integers(-254, 255, x.shape).astype(np.float32) / 2
        x[:, ::32] = 127
    if name == "one infinity":
        x[tokens // 2, columns // 3] = np.inf
    if name == "one NaN":
        x[tokens // 2, -1] = np.nan
    return x


def bits(values: np.ndarray) -> np.ndarray:
    """Float32's bits; NaN has many, and counts as one."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)


def close(got: np.ndarray, case: Case, x: np.ndarray) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        wanted, bound = expected(case, x)
        single = wanted.astype(np.float32)
        near = np.abs(got - wanted) <= bound
    assert (near | (got == single) | (np.isnan(got) & np.isnan(single))).all()


@pytest.mark.parametrize("set_name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_those_in_float64(kind: str, set_name: str) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        case = make(kind, rows, columns, seed)
        x = inputs("normal", 13, columns)
        close(product(case.weight, x, set_name), case, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_product_does_not_depend_on_the_others(kind: str) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        case, x = make(kind, rows, columns, seed), inputs("normal", 13, columns)
        wanted = bits(product(case.weight, x, "scalar"))
        for name in SETS:
            for tokens in range(1, 14):
                got = product(case.weight, x[13 - tokens :], name)
                assert np.array_equal(bits(got), wanted[13 - tokens :]), (name, rows, tokens)


@pytest.mark.parametrize("fill", ["random", "full", "special"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "values",
    [
        "zeros",
        "1e-40",
        "1e30",
        "ties",
        "largest codes",
        "equal signs",
        "one infinity",
        "one NaN",
    ],
)
def test_extreme_inputs_and_weights(values: str, kind: str, fill: str) -> None:
    case, x = make(kind, 17, 96, 5, fill), inputs(values, 5, 96)
    wanted = bits(product(case.weight, x, "scalar"))
    for name in SETS:
        got = product(case.weight, x, name)
        assert np.array_equal(bits(got), wanted), name
        close(got, case, x)
        if values == "one NaN" and fill != "special":
            assert np.isnan(got[2]).all() and np.isfinite(np.delete(got, 2, axis=0)).all()


@pytest.mark.parametrize("set_name", SETS)
def test_integer_sums_are_exact(set_name: str) -> None:
    # a block of 32 largest products: 16-bit sums would overflow if they took more of them
    for kind, code in (("Q4_0", 7), ("Q4_1", 15), ("Q8_0", -128)):
        case = make(kind, 1, 32, 0, "full")
        case.weight.data[..., :2] = np.array([1], np.float16).view(np.uint8)
        if kind == "Q4_1":
            case.weight.data[..., 2:4] = 0
        for sign in (-1, 1):
            got = product(case.weight, np.full((1, 32), sign * 127, np.float32), set_name)
            assert got == sign * 32 * 127 * code


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", ["random", "full", "special"])
def test_decoded_rows(kind: str, fill: str) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        case = make(kind, rows, columns, seed, fill)
        got = np.stack([decode_row(case.weight, row) for row in range(rows)])
        assert np.array_equal(got, case.decoded())


MODELS = {
    "tied": None,
    "untied": None,
    "8-bit": None,
    "odd width": None,
    "heads of 20": {"head_dim": 20},
    "window": {"sliding_window": 9},
    **FAMILIES,
}
"""Changes of a float model; None: one of `save_quantized`."""


@pytest.mark.parametrize("int8_cache", [False, True], ids=["float16 cache", "int8 cache"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_engine_has_the_same_bits_with_every_set(
    tmp_path: Path, kind: str, int8_cache: bool
) -> None:
    changes = MODELS[kind]
    if changes is None:
        save_quantized(tmp_path, kind)
    else:
        save_random_model(tmp_path / "q", **changes)
    raw = open_raw(tmp_path / "q")
    assert raw is not None
    model, ids = build(raw), np.random.default_rng(1).integers(0, 320, 100).tolist()
    rows = {}
    for name in SETS:
        context = NativeContext(model, 1, int8_cache=int8_cache, kernels=name)
        assert context.kernels == name
        sequence = context.add()
        steps = [ids[:69], *([token] for token in ids[69:75]), ids[75:]]
        parts = [context.extend(step, [sequence] * len(step), range(len(step))) for step in steps]
        rows[name] = np.concatenate(parts)
    assert np.isfinite(rows["scalar"]).all() and rows["scalar"].std() > 0.1
    for name in SETS:
        assert np.array_equal(bits(rows[name]), bits(rows["scalar"])), name


def test_the_environment_chooses_the_kernels(tmp_path: Path, monkeypatch) -> None:
    save_random_model(tmp_path)
    raw = open_raw(tmp_path)
    assert raw is not None
    model = build(raw)
    monkeypatch.delenv("XINSLM_KERNELS", raising=False)
    assert NativeContext(model, 1).kernels == SETS[0]
    for name in SETS:
        monkeypatch.setenv("XINSLM_KERNELS", name)
        assert NativeContext(model, 1).kernels == name
    monkeypatch.setenv("XINSLM_KERNELS", "mmx")
    for use in (lambda: NativeContext(model, 1), lambda: native_info(NativeConfig())):
        with pytest.raises(UsageError, match=f"XINSLM_KERNELS is 'mmx'.* one of {', '.join(SETS)}"):
            use()
    with pytest.raises(XinslmError, match=f"no kernels 'mmx', only: {' '.join(SETS)}"):
        NativeContext(model, 1, kernels="mmx")
