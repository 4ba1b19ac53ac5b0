"""Distances between hidden states against plain numpy, finite differences and what must not change
them.
"""

import numpy as np
import pytest
import torch

from xinslm.cache.projected_states import depth_at, rms_normalise
from xinslm.distill.contrast import draw_places, info_nce
from xinslm.distill.matching import linear_cka, projected_error


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slopes(function, *inputs, eps=1e-6):
    """Derivatives of a scalar function by central differences, one input element at a time."""
    found = []
    for which, tensor in enumerate(inputs):
        slope = torch.zeros_like(tensor)
        for index in np.ndindex(*tensor.shape):
            values = []
            for sign in (1, -1):
                moved = [t.clone() for t in inputs]
                moved[which][index] += sign * eps
                values.append(float(function(*moved)))
            slope[index] = (values[0] - values[1]) / (2 * eps)
        found.append(slope)
    return found


LABELS = torch.tensor([3, 1, 3, 2, 5])
LOSSES = {
    "projector": (lambda x, p, s: projected_error(x, p, s).sum(), [(5, 4), (3, 4), (5, 3)]),
    "cka": (linear_cka, [(5, 4), (5, 3)]),
    "contrast": (lambda a, b: info_nce(a, b, LABELS, 0.2), [(5, 3), (5, 3)]),
    "norm": (lambda x: (rms_normalise(x) * draw(5, 4, seed=9)).sum(), [(5, 4)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_slopes_of_the_values(name):
    function, shapes = LOSSES[name]
    inputs = [draw(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    function(*inputs).backward()
    for tensor, slope in zip(inputs, slopes(function, *(t.detach() for t in inputs)), strict=True):
        torch.testing.assert_close(tensor.grad, slope, atol=1e-8, rtol=1e-6)


def test_projected_error_is_relative_and_zero_for_an_exact_map():
    x, p = draw(7, 4), draw(3, 4, seed=1)
    targets = x @ p.t()
    torch.testing.assert_close(projected_error(x, p, targets), torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(
        projected_error(x, 0 * p, 5 * targets), torch.ones(7, dtype=torch.float64)
    )
    expected = [
        ((p.numpy() @ x.numpy()[i] - 2 * targets.numpy()[i]) ** 2).sum()
        / ((2 * targets.numpy()[i]) ** 2).sum()
        for i in range(7)
    ]
    np.testing.assert_allclose(projected_error(x, p, 2 * targets).numpy(), expected, rtol=1e-12)


def plain_cka(x, y):
    """Kornblith et al. 2019 by way of Gram matrices and HSIC, not of features."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def test_cka_is_the_published_one_and_blind_to_rotation_scale_and_shift():
    x, y = draw(40, 6), draw(40, 9, seed=1)
    y[:, :6] += x
    found = float(linear_cka(x, y))
    assert found == pytest.approx(plain_cka(x.numpy(), y.numpy()), rel=1e-12)
    assert 0.2 < found < 0.9
    turn = torch.linalg.qr(draw(6, 6, seed=2))[0]
    assert float(linear_cka(7 * x @ turn + 3, 0.1 * y)) == pytest.approx(found, rel=1e-12)
    assert float(linear_cka(x, x @ turn)) == pytest.approx(1, rel=1e-12)
    stretched = x * torch.tensor([1.0, 1, 1, 1, 1, 20])
    assert abs(float(linear_cka(stretched, y)) - found) > 0.05, (
        "only rotations are free, not every linear map"
    )


def test_contrast_is_a_softmax_over_cosines_without_equal_next_tokens():
    a, b = draw(5, 3), draw(5, 3, seed=1)
    x, y = (t.numpy() - t.numpy().mean(0) for t in (a, b))
    terms = []
    for i in range(5):
        cosine = [
            x[i] @ y[j] / (np.linalg.norm(x[i]) * np.linalg.norm(y[j])) / 0.07 for j in range(5)
        ]
        others = [j for j in range(5) if j == i or LABELS[j] != LABELS[i]]
        terms.append(np.log(sum(np.exp(cosine[j]) for j in others)) - cosine[i])
    assert float(info_nce(a, b, LABELS, 0.07)) == pytest.approx(np.mean(terms), rel=1e-10)
    assert float(info_nce(a, b, torch.arange(5), 0.07)) > float(info_nce(a, b, LABELS, 0.07))


def test_a_masked_negative_carries_no_gradient():
    a, b = draw(2, 3), draw(2, 3, seed=1).requires_grad_()
    info_nce(a, b, torch.tensor([4, 4]), 0.07).backward()
    assert torch.equal(b.grad, torch.zeros_like(b)), (
        "with no negative left there is nothing to tell apart"
    )
    a, b = draw(3, 3), draw(3, 3, seed=1)
    x, y = (torch.nn.functional.normalize(t - t.mean(0)) for t in (a, b))
    scores = (x @ y.t() / 0.07).numpy()
    scores[0, 1] = scores[1, 0] = -np.inf
    expected = np.mean(np.log(np.exp(scores).sum(1)) - scores.diagonal())
    assert float(info_nce(a, b, torch.tensor([4, 4, 5]), 0.07)) == pytest.approx(
        expected, rel=1e-10
    )


def test_what_all_states_share_does_not_hide_their_differences():
    """Of states with a common part fifty times their own, all cosines are near 1."""
    b = draw(64, 16)
    labels, common = torch.arange(64), 200 * draw(1, 16, seed=3)
    found = float(info_nce(b + common, b + common, labels, 0.07))
    assert found == pytest.approx(float(info_nce(b, b, labels, 0.07)), rel=1e-6)


def test_equal_states_contrast_best():
    b = draw(64, 16)
    labels = torch.arange(64)
    assert (
        float(info_nce(b, b, labels, 0.07))
        < 0.1
        < np.log(64) - 1
        < float(info_nce(draw(64, 16, seed=5), b, labels, 1.0))
    )


@pytest.mark.parametrize(
    ("student", "teacher"), [(2, 6), (3, 6), (4, 6), (6, 6), (8, 6), (12, 80), (1, 5), (28, 61)]
)
def test_depth_map_rises_and_ends_at_the_last_blocks(student, teacher):
    """A map (l, l) would give a shallow student the teacher's lower half only."""
    pairs = [
        (depth_at(l / student, student), depth_at(l / student, teacher))
        for l in range(1, student + 1)
    ]
    assert [s for s, _ in pairs] == list(range(1, student + 1))
    assert [t for _, t in pairs] == [-(-l * teacher // student) for l in range(1, student + 1)]
    assert pairs[-1] == (student, teacher)
    shares = np.linspace(0.001, 1, 400)
    for layers in (student, teacher):
        depths = [depth_at(float(share), layers) for share in shares]
        assert depths == sorted(depths) and depths[0] == 1 and depths[-1] == layers


def test_drawn_places_follow_from_the_seed_alone():
    candidates = np.arange(100, 900)
    one = draw_places(candidates, 64, (0, 3, 7))
    assert np.array_equal(one, draw_places(candidates, 64, (0, 3, 7)))
    assert (
        len(set(one.tolist())) == 64
        and set(one) <= set(candidates)
        and np.array_equal(one, np.sort(one))
    )
    assert not np.array_equal(one, draw_places(candidates, 64, (0, 4, 7)))
    assert np.array_equal(draw_places(candidates[:10], 64, (0, 3, 7)), candidates[:10])
