"""Products with inputs in int8 blocks: against llama.cpp's own functions, a loop over blocks in
rational numbers, and in every place of a model.
"""

import platform
from fractions import Fraction

import numpy as np
import pytest
import torch

from small_models import save_random_model
from xinslm.errors import UsageError
from xinslm.export.config import GgufConfig, HfConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.export.packed_folder import run_hf as export_hf
from xinslm.inference.torch_engine import TorchEngine
from xinslm.model.files import load_model, open_model
from xinslm.model.grids import Q4_0, Q8_0, decode, pack_nibbles, to_ggml
from xinslm.model.int8_inputs import int8_product, quantize_inputs
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize


def random_inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Blocks of magnitudes from 1e-4 to 1e4, with outliers, as activations have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns // 32, 32)) * 10 ** rng.uniform(-4, 4, (rows, 1, 1))
    x[..., 3] *= 30 * rng.random((rows, columns // 32))
    return torch.from_numpy(x.reshape(rows, columns).astype(np.float32))


def random_weight(rows: int, columns: int, grid) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(5)
    codes = torch.from_numpy(rng.integers(grid.lowest, grid.highest + 1, (rows, columns)))
    scales = torch.from_numpy(rng.standard_normal((rows, columns // 32)) / 64).half()
    return codes.to(torch.int8), scales


def test_codes_and_scales_are_llama_cpps():
    """Equal on x86, ties included; elsewhere, and in the portable version, the other product of
    the input and the inverse may move a code near a tie by one.
    """
    ggml = pytest.importorskip("ggml")
    x = random_inputs(4000, 512)
    x[0, :32] = torch.arange(32) + 0.5  # with the largest 127, codes that are ties
    x[0, 0] = 127.0
    x[1] = 0.0
    x[2, :32] = torch.linspace(-3e-5, 2e-5, 32)  # a subnormal scale
    codes, scales = quantize_inputs(x)
    blocks = ggml.q8_0_rows(x.numpy())
    assert np.array_equal(ggml.scales_of(blocks), scales.half().numpy())
    difference = np.abs(ggml.codes_of(blocks) - codes.numpy())
    if platform.machine() == "x86_64":
        assert not difference.any()
    portable = ggml.codes_of(ggml.q8_0_rows(x[1:].numpy(), "quantize_row_q8_0_ref"))
    other = np.abs(portable - codes[1:].numpy())
    assert max(difference.max(), other.max()) <= 1 and (other > 0).mean() < 1e-3


@pytest.mark.parametrize("grid", [Q4_0, Q8_0], ids=lambda grid: grid.name)
def test_products_are_llama_cpps_up_to_its_float32_sums(grid):
    ggml = pytest.importorskip("ggml")
    x = random_inputs(40, 512)
    codes, scales = random_weight(3, 512, grid)
    weight = decode(codes, scales)
    rows = to_ggml(pack_nibbles(codes) if grid is Q4_0 else codes, scales)
    theirs = ggml.products(rows, grid.name, ggml.q8_0_rows(x.numpy()))
    found = int8_product(x, weight).numpy()
    largest = (x.abs().double() @ weight.abs().double().T).numpy()
    assert (np.abs(found - theirs) < 1e-6 * largest).all()
    exact = (x.double() @ weight.double().T).numpy()
    assert np.abs(found - exact).max() > 1e-4 * np.abs(exact).max(), "inputs were not rounded"


@pytest.mark.parametrize("grid", [Q4_0, Q8_0], ids=lambda grid: grid.name)
def test_products_equal_a_loop_over_blocks_in_rational_numbers(grid):
    x = random_inputs(3, 96, seed=1)
    codes, scales = random_weight(4, 96, grid)
    found = int8_product(x, decode(codes, scales))
    for i, row in enumerate(x.numpy()):
        for j in range(len(codes)):
            total = Fraction(0)
            for block in range(3):
                part = row[32 * block : 32 * block + 32]
                largest = np.abs(part).max()
                steps = np.rint(part * (np.float32(127) / largest)).astype(int)
                own = codes[j, 32 * block : 32 * block + 32].numpy().astype(int)
                scale = Fraction(float(np.float16(largest / np.float32(127))))
                total += Fraction(float(scales[j, block])) * scale * int(steps @ own)
            assert found[i, j] == np.float32(float(total))


def test_saturated_blocks_are_exact():
    """The largest integer sums, 32 x 8 x 127 and 32 x 127 x 127, which 16-bit sums do not hold."""
    for code in (-8, -127, 127):
        weight = torch.full((2, 64), float(code))
        weight[1] = -weight[1]
        x = torch.full((1, 64), 127.0)
        assert int8_product(x, weight).tolist() == [[64 * 127 * code, -64 * 127 * code]]
        assert int8_product(-x, weight).tolist() == [[-64 * 127 * code, 64 * 127 * code]]


def test_zero_blocks_nan_and_infinity():
    weight = torch.ones(3, 64)
    x = torch.zeros(6, 64)
    x[1, 5] = 1e-42  # 127 / largest is infinite
    x[2, 5] = 1e-7  # the scale is 0 in float16
    x[3, 40] = 3.0
    x[4, 7] = torch.nan
    x[5, 7] = torch.inf
    found = int8_product(x, weight)
    assert found[:3].eq(0).all()
    three = np.float32(np.float16(np.float32(3) / np.float32(127))) * 127
    assert found[3].eq(float(three)).all()
    assert found[4:].isnan().all(), "NaN stays in its own rows, and does not get lost"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tied and an untied model at 4 bits; the untied one has down projections without codes."""
    root = tmp_path_factory.mktemp("int8")
    for name, changes in {
        "tied": {},
        "untied": {"tie_word_embeddings": False, "intermediate_size": 100},
    }.items():
        save_random_model(root / name, **changes)
        quantize(QuantizeConfig(root / name, root / f"{name}-q4", method="rtn"))
    return root


def spread_of(difference: torch.Tensor, logits: torch.Tensor) -> float:
    return float(difference.std() / logits.std())


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_every_product_with_codes_is_rounded_and_nothing_else(models, name):
    """Against a plain model whose inputs hooks replace by `quantize_inputs`, the head's too."""
    model = load_model(models / f"{name}-q4", activations="int8")
    assert model.int8_layers == ((15, 15) if name == "tied" else (13, 15))
    plain = load_model(models / f"{name}-q4")
    ids = torch.arange(5, 65)[None]

    def rounded(x):
        return decode(*quantize_inputs(x))

    for module_name, module in plain.named_modules():
        if module_name.endswith("_proj") and module.in_features % 32 == 0:
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    with torch.no_grad():
        expected = plain.logits(rounded(plain.hidden(ids)))
        found = model.logits(model.hidden(ids))
        exact = load_model(models / f"{name}-q4")
        unrounded = exact.logits(exact.hidden(ids))
    # a code at a tie may fall the other way, so not equal to the last bit
    assert spread_of(found - expected, expected) < 0.2 * spread_of(found - unrounded, expected)
    assert spread_of(found[:, :4] - expected[:, :4], expected) < 1e-3
    weights = zip(model.parameters(), exact.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights), "weights and embedding stay"


def test_generation_equals_whole_passes(models):
    engine = TorchEngine.load(models / "tied-q4", "cpu", "auto", activations="int8")
    model = load_model(models / "tied-q4", activations="int8")
    ids = [i * 7 % 300 for i in range(20)]
    with torch.no_grad():
        whole = model.logits(model.hidden(torch.tensor([[*ids, 9, 11]])))[0].numpy()
        exact = load_model(models / "tied-q4")
        plain = exact.logits(exact.hidden(torch.tensor([ids])))[0, -1].numpy()
    found = [engine.start(ids), engine.step(9), engine.step(11)]
    assert np.abs(np.stack(found) - whole[19:]).max() < 0.02 * whole.std()
    assert np.abs(found[0] - whole[19]).max() < 0.2 * np.abs(found[0] - plain).max()


def test_every_file_with_codes_gives_the_same(models, tmp_path):
    source = models / "tied-q4"
    export_gguf(GgufConfig(source, tmp_path / "m.gguf"))
    export_hf(HfConfig(source, tmp_path / "hf"))
    ids = torch.arange(5, 45)[None]
    expected, gguf, packed = (
        load_model(path, activations="int8")
        for path in (source, tmp_path / "m.gguf", tmp_path / "hf")
    )
    assert packed.int8_layers == (14, 15), "transformers' folder has an unquantized embedding"
    with torch.no_grad():
        assert torch.equal(gguf.hidden(ids), expected.hidden(ids))
        assert torch.equal(packed.hidden(ids), expected.hidden(ids))
        assert torch.equal(gguf.logits(gguf.hidden(ids)), expected.logits(expected.hidden(ids)))


def test_models_without_codes_and_other_types_are_refused(models):
    with pytest.raises(UsageError, match=r"tied has no linear layer .*xinslm quantize"):
        load_model(models / "tied", activations="int8")
    with pytest.raises(UsageError, match="pass --dtype float32"):
        open_model(models / "tied-q4").transformer(torch.bfloat16, activations="int8")
