"""Tables of palettes against exact k-means, and error feedback against its textbook form."""

import numpy as np
import pytest
import torch

from xinslm.export.coreml.fit import feed_back_errors, fit_linear
from xinslm.export.coreml.palettes import fit_palette
from xinslm.quantize.gptq import Drift, factorise


def exact_error(values: np.ndarray, weights: np.ndarray, entries: int) -> float:
    """Smallest weighted squared error with `entries` numbers: dynamic programming over cuts of the
    sorted values (Wang and Song 2011).
    """
    order = values.argsort()
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    count = len(x)
    mass, first, second = (np.append(0, np.cumsum(w * x**power)) for power in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        spans = mass[None] - mass[:, None]
        cost = second[None] - second[:, None] - (first[None] - first[:, None]) ** 2 / spans
    cost[np.tril_indices(count + 1)] = np.inf
    best = cost[0]
    for _ in range(entries - 1):
        best = np.minimum(best, (best[:, None] + cost).min(0))
    return float(best[count])


@pytest.mark.parametrize("tails", [1.0, 3.0], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_are_near_the_best_ones(tails, weighted):
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(4, 150))
    numbers = np.sign(numbers) * np.abs(numbers) ** tails
    importance = np.exp(generator.normal(size=150)) if weighted else np.ones(150)
    palette = fit_palette(
        torch.tensor(numbers, dtype=torch.float32),
        3,
        2,
        torch.tensor(importance, dtype=torch.float32) if weighted else None,
    )
    assert palette.tables.shape == (2, 8) and palette.tables.dtype == torch.float16
    found = (importance * (palette.decode().numpy() - numbers) ** 2).reshape(2, -1).sum(1)
    both = np.tile(importance, 2)
    best = [exact_error(group.reshape(-1), both, 8) for group in np.split(numbers, 2)]
    assert (found >= np.array(best) * 0.999).all()
    assert found.sum() < 1.2 * sum(best)


def test_each_weight_gets_the_nearest_number_of_its_own_group():
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    weight[16:] *= 10
    palette = fit_palette(weight, 4, 16)
    assert palette.bits == 4 and palette.indices.dtype == torch.uint8
    tables = palette.tables.float()
    assert (tables.diff(dim=1) > 0).all() and tables[1].abs().max() > 5 * tables[0].abs().max()
    for row in range(32):
        distances = (weight[row][:, None] - tables[row // 16]).abs()
        own = distances.gather(1, palette.indices[row].long()[:, None])[:, 0]
        assert torch.equal(own, distances.min(1).values)
        assert torch.equal(palette.decode()[row], tables[row // 16][palette.indices[row].long()])


def test_few_values_are_kept_exactly():
    weight = torch.tensor([-3.5, 0.25, 8.0])[torch.randint(0, 3, (16, 20))]
    assert torch.equal(fit_palette(weight, 4, 16).decode(), weight)
    assert torch.equal(fit_palette(torch.full((8, 5), 0.5), 4, 8).decode(), torch.full((8, 5), 0.5))
    assert torch.equal(fit_palette(torch.zeros(8, 5), 8, 8).decode(), torch.zeros(8, 5))


def test_inputs_that_are_always_zero_do_not_lose_their_weights():
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    importance = torch.tensor([1.0] * 7 + [0.0])
    weight[:, 7] = 30
    assert (fit_palette(weight, 4, 16, importance).decode()[:, 7] - 30).abs().max() < 0.1
    assert torch.isfinite(fit_palette(weight, 4, 16, torch.zeros(8)).decode()).all()


def inputs_and_weight(columns=48, rows=32):
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator) @ mixing
    inputs[:, 5] *= 6
    return inputs, torch.randn(rows, columns, generator=generator)


def test_error_feedback_is_that_of_gptq():
    """Against GPTQ as its paper states it: the inverse Hessian shrinks column by column."""
    inputs, weight = inputs_and_weight()
    hessian = (inputs.T @ inputs / len(inputs)).double()
    factor = factorise(hessian.clone())
    tables = fit_palette(weight, 4, 16).tables
    found = feed_back_errors(weight, tables, factor)
    damped = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(48).double()
    work, order = weight.double().clone(), factor.order.tolist()
    numbers = tables.double().repeat_interleave(16, 0)
    inverse = damped.inverse()
    expected = torch.empty_like(found)
    for column in order:
        index = (work[:, column, None] - numbers).abs().argmin(1)
        error = work[:, column] - numbers.gather(1, index[:, None])[:, 0]
        along = inverse[column] / inverse[column, column]
        work -= error[:, None] * along
        inverse = inverse - torch.outer(inverse[:, column], along)
        expected[:, column] = index.to(torch.uint8)
    assert (found != expected).float().mean() < 0.01  # ties in float32


def test_calibration_lowers_the_error_of_the_outputs():
    inputs, weight = inputs_and_weight()
    hessian = (inputs.T @ inputs / len(inputs)).double()
    wanted = inputs @ weight.T

    def error(factor):
        decoded = fit_linear(weight, 16, factor).decode()
        return float((inputs @ decoded.T - wanted).square().mean())

    assert error(factorise(hessian.clone())) < 0.5 * error(None)
    # inputs that have drifted: the weights move to the least-squares solution
    drift = torch.randn(400, 48, generator=torch.Generator().manual_seed(3)) * 0.3
    seen = inputs + drift
    moments = (seen.T @ seen / 400).double(), Drift(-drift.T @ seen / 400)
    without, with_drift = factorise(moments[0].clone()), factorise(*moments)
    results = [
        float((seen @ fit_linear(weight, 16, factor).decode().T - wanted).square().mean())
        for factor in (without, with_drift)
    ]
    assert results[1] < results[0]
