"""Several teachers in one loss, against whole distributions in float64 with autograd."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from loss_oracle import DIVERGENCES, ROWS, VOCAB, assert_same, grads, plain_kd, problem, sparsify
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import HeadOptions, fused_loss
from xinslm.losses.targets import BucketTargets, MixedTargets

SHARES = (3.0, 1.0)


def two_teachers():
    first, second = (problem(seed)[3] for seed in (0, 1))
    covered = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(3)) < 0.6
    parts = [
        replace(sparsify(teacher, seed=seed), valid_mask=where)
        for seed, (teacher, where) in enumerate(zip((first, second), covered, strict=True))
    ]
    assert {(bool(a), bool(b)) for a, b in covered.T} == {(x, y) for x in (0, 1) for y in (0, 1)}
    return (first, second), parts, covered


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk", [None, 5])
def test_value_and_gradient_are_the_weighted_mean_over_the_teachers_that_know_a_position(
    name, chunk
):
    hidden, weight, labels, _ = problem()
    teachers, parts, covered = two_teachers()
    config = LossConfig(alpha=0.3, beta=0.7, divergence=name)

    def oracle(h, w):
        z = (h @ w.t()).double()
        ce = F.cross_entropy(z, labels, reduction="none")
        kd = torch.stack(
            [plain_kd(z, x, part, config) for x, part in zip(teachers, parts, strict=True)]
        )
        shares = covered * torch.tensor(SHARES)[:, None]
        mean = (kd * shares).sum(0) / shares.sum(0).clamp_min(1e-9)
        return (config.alpha * ce + config.beta * torch.where(covered.any(0), mean, ce)).mean()

    mixed = MixedTargets.of(parts, SHARES)
    ours = grads(
        lambda h, w: fused_loss(h, w, labels, mixed, config, head=HeadOptions(chunk_rows=chunk))[0],
        hidden,
        weight,
    )
    assert_same(ours, grads(oracle, hidden, weight), atol=1e-6)


def test_forward_kl_to_two_teachers_has_the_gradient_of_the_one_to_their_mixture():
    """As `cache merge` would give it, with distributions that are known exactly."""
    hidden, weight, labels, first = problem()
    second = problem(1)[3]
    config = LossConfig(alpha=0.2, beta=0.8)
    exact = [sparsify(x, top_k=VOCAB - 1, tail_samples=1) for x in (first, second)]
    merged = (0.75 * first.softmax(1) + 0.25 * second.softmax(1)).log()
    sides = (MixedTargets.of(exact, SHARES), sparsify(merged, top_k=VOCAB - 1, tail_samples=1))
    (_, *ours), (_, *theirs) = (
        grads(lambda h, w, side=side: fused_loss(h, w, labels, side, config)[0], hidden, weight)
        for side in sides
    )
    assert_same(ours, theirs, atol=1e-6, rtol=1e-4)


def test_buckets_and_single_tokens_mix():
    """Each part alone gives its own gradient; together the weighted mean and one CE."""
    hidden, weight, labels, teacher = problem()
    sparse = sparsify(teacher)
    columns = torch.tensor([[0, 10, 30]]).expand(ROWS, 3)
    buckets = BucketTargets(
        torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4)),
        columns,
        columns + 8,
        torch.tensor([[0.2, 0.5, 0.1]]).expand(ROWS, 3),
        torch.zeros(ROWS, 3, dtype=torch.int64),
        torch.zeros(ROWS, 3, dtype=torch.bool),
        torch.arange(ROWS) % 4 > 0,
    )
    config = LossConfig(alpha=0.4, beta=0.6)

    def of(side):
        return grads(lambda h, w: fused_loss(h, w, labels, side, config)[0], hidden, weight)

    covered = buckets.valid_mask
    both, rest = covered.nonzero()[:, 0], (~covered).nonzero()[:, 0]
    mixed = MixedTargets.of((sparse, buckets), SHARES)
    assert torch.equal(mixed.weights[rest], torch.tensor([[1.0, 0.0]]).expand(len(rest), 2))
    whole = of(mixed)

    def parts(h, w):
        def mean(rows, side):
            return fused_loss(h[rows], w, labels[rows], side[rows], config, float(ROWS))[0]

        return 0.75 * mean(both, sparse) + 0.25 * mean(both, buckets) + mean(rest, sparse)

    assert_same(whole, grads(parts, hidden, weight), atol=1e-6)
    with pytest.raises(ValueError, match="temperature 1"):
        fused_loss(hidden, weight, labels, mixed, LossConfig(temperature=2.0))


def test_one_teacher_with_all_the_weight_is_alone():
    hidden, weight, labels, teacher = problem()
    sparse, other = sparsify(teacher), sparsify(problem(1)[3])
    alone, metrics = fused_loss(hidden, weight, labels, sparse, LossConfig())
    mixed, same = fused_loss(
        hidden, weight, labels, MixedTargets.of((sparse, other), (2.0, 0.0)), LossConfig()
    )
    torch.testing.assert_close(mixed, alone)
    assert same.kd == pytest.approx(metrics.kd) and same.ce == pytest.approx(metrics.ce)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (0.0, 0.0), (2.0, -1.0), (1e400, 1)])
def test_weights_that_mean_nothing_are_refused(weights):
    teacher = problem()[3]
    parts = (sparsify(teacher), sparsify(teacher))
    with pytest.raises(ValueError, match="targets of 2 teachers"):
        MixedTargets.of(parts, weights)


def test_only_ratios_of_weights_count_however_large_they_are():
    teacher = problem()[3]
    parts = (sparsify(teacher), sparsify(teacher))
    for scale in (1e-46, 1.0, 1e39):
        found = MixedTargets.of(parts, (3 * scale, scale)).weights
        torch.testing.assert_close(found, torch.tensor([[0.75, 0.25]]).expand(ROWS, 2))
