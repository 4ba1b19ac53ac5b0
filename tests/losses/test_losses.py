"""The fused head against dense autograd in float64, finite differences and statistics over
tail samples.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from loss_oracle import (
    DIVERGENCES,
    ROWS,
    TAIL_SAMPLES,
    VOCAB,
    assert_same,
    dense_oracle,
    grads,
    in_double,
    problem,
    sparsify,
)
from xinslm.cache.entries import CacheFormat, decode, encode
from xinslm.losses.chunk import chunk_loss
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import HeadOptions, fused_loss
from xinslm.losses.targets import DenseTargets

DIVERGENCE_SETTINGS = [
    (divergence, mode, temperature, tail_weight)
    for divergence in DIVERGENCES
    for mode, temperature, tail_weight in [
        ("decoupled", 1.0, 0.0),
        ("full", 2.0, 0.0),
        ("decoupled", 1.0, 1.0),
        ("decoupled", 1.0, 0.3),
        ("decoupled", 2.0, 1.0),
        ("decoupled", 2.0, 0.0),
    ]
    if divergence == "forward_kl" or (tail_weight == 0 and (mode == "full" or temperature == 1))
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize(("divergence", "mode", "temperature", "tail_weight"), DIVERGENCE_SETTINGS)
def test_loss_and_gradients_equal_the_dense_oracle(
    divergence, mode, temperature, tail_weight, alpha, sparse, tied
):
    """Whole and in three micro-batches, in one chunk and in chunks that do not divide the rows."""
    hidden, weight, labels, teacher = problem()
    ids = torch.arange(ROWS) * 7 % VOCAB
    config = LossConfig(
        alpha, 0.7, temperature, mode, tail_weight, divergence, jsd_weight=0.3, skew=0.2
    )
    cached = sparsify(teacher, temperature) if sparse else None

    def ours(cuts, chunk_rows):
        head = HeadOptions(chunk_rows=chunk_rows)

        def loss(*leaves):
            w = leaves[-1]
            h = w[ids] if tied else leaves[0]
            total = 0.0
            for a, b in itertools.pairwise(cuts):
                rows = slice(a, b)
                given = (
                    cached[rows] if sparse else DenseTargets(lambda part, a=a: teacher[a:][part])
                )
                total += fused_loss(h[rows], w, labels[rows], given, config, ROWS, head)[0]
            return total

        return loss

    def oracle(*leaves):
        w = leaves[-1]
        return dense_oracle(w[ids] if tied else leaves[0], w, labels, teacher, cached, config)

    leaves = (weight,) if tied else (hidden, weight)
    expected = grads(oracle, *leaves)
    assert_same(grads(ours((0, ROWS), 256), *leaves), expected)
    assert_same(grads(ours((0, ROWS), 10), *leaves), expected)
    assert_same(grads(ours((0, 3, 20, ROWS), 8), *leaves), expected)


def test_cross_entropy_alone():
    hidden, weight, labels, _ = problem()
    plain = grads(lambda h, w: F.cross_entropy(h @ w.t(), labels), hidden, weight)
    for config, targets in [
        (LossConfig(1.0, 0.0), sparsify(problem()[3])),
        (LossConfig(0.1, 0.9), None),
    ]:
        ours = grads(
            lambda h, w, c=config, t=targets: fused_loss(h, w, labels, t, c)[0], hidden, weight
        )
        assert_same(ours, plain)


@pytest.mark.parametrize(
    ("divergence", "mode", "tail_weight"),
    [("forward_kl", "decoupled", 0.5)] + [(divergence, "full", 0.0) for divergence in DIVERGENCES],
)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_gradient_at_temperature_2_is_the_slope_of_the_value(divergence, mode, tail_weight, sparse):
    """T^2 in the value but not in the gradient would show as a ratio of 4 (seen in a peer)."""
    _, _, labels, teacher = problem(rows=5)
    z = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3)).double()
    config = LossConfig(0.0, 1.0, 2.0, mode, tail_weight, divergence)
    targets = in_double(sparsify(teacher.double(), 2.0)) if sparse else teacher.double()
    gradient = z.clone()
    chunk_loss(gradient, labels[:5], targets, config)
    step = 1e-5
    for row, column in [
        (0, 0),
        (1, 7),
        (2, int(labels[2])),
        (3, 49),
        (4, int(teacher[4].argmax())),
    ]:
        values = []
        for sign in (1, -1):
            moved = z.clone()
            moved[row, column] += sign * step
            values.append(chunk_loss(moved, labels[:5], targets, config)[1].item())
        slope = (values[0] - values[1]) / (2 * step)
        assert gradient[row, column].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_dense_kd_is_pytorchs_kl_div_times_t_squared(temperature):
    """Hinton et al. 2015: T^2 KL of the tempered distributions, and its gradient."""
    hidden, weight, labels, teacher = problem()
    config = LossConfig(0.0, 1.0, temperature, "full")
    ours = hidden.clone().requires_grad_()
    loss, metrics = fused_loss(
        ours, weight, labels, DenseTargets(lambda rows: teacher[rows]), config
    )
    loss.backward()
    theirs = hidden.clone().requires_grad_()
    log_q = (theirs @ weight.t() / temperature).log_softmax(1)
    expected = temperature**2 * F.kl_div(
        log_q, (teacher / temperature).softmax(1), reduction="batchmean"
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.kd == pytest.approx(expected.item() * ROWS, rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("divergence", "mode", "temperature"), sorted({row[:3] for row in DIVERGENCE_SETTINGS})
)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_no_gradient_where_the_student_equals_the_teacher(divergence, mode, temperature, sparse):
    """Renormalising a top-k breaks this: the student would be pushed away from the very teacher."""
    teacher = problem()[3]
    z, labels = teacher.clone(), torch.zeros(ROWS, dtype=torch.long)
    config = LossConfig(0.0, 1.0, temperature, mode, 0.0, divergence)
    _, kd = chunk_loss(z, labels, sparsify(teacher) if sparse else teacher, config)
    assert z.abs().max() < 2e-6
    assert abs(kd.item()) < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DIVERGENCES),
    st.sampled_from([1.0, 2.0, 0.5]),
    st.floats(0.0, 30.0),
    st.floats(0.1, 30.0),
    st.floats(0.01, 0.99),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_divergence_is_never_negative_and_needs_no_clamp(
    divergence, temperature, far, sharp, share, sparse, seed
):
    """A truncated top-k sum is negative wherever the student is surer than the teacher (seen in a
    peer).
    """
    g = torch.Generator().manual_seed(seed)
    teacher = sharp * torch.randn(8, VOCAB, generator=g)
    student = teacher + far * torch.randn(8, VOCAB, generator=g)
    config = LossConfig(0.0, 1.0, temperature, "full", None, divergence, share, share)
    targets = sparsify(teacher, temperature) if sparse else teacher
    for row in range(8):
        part, z = slice(row, row + 1), student[row : row + 1].clone()
        rounding = 4e-7 * max(25.0, z.abs().max().item())  # float32's, of logits up to 100
        _, kd = chunk_loss(z, torch.zeros(1, dtype=torch.long), targets[part], config)
        assert kd.item() >= -rounding * temperature**2
        assert torch.isfinite(z).all()
        assert z.sum().abs() < 1e-3 * max(1.0, far)


def test_expected_sparse_gradient_is_the_full_vocabulary_one():
    repeats = 4000
    _, _, labels, teacher = problem(rows=4)
    student = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(9))
    config = LossConfig(0.0, 1.0, 1.0, "decoupled", 1.0)
    exact = student.clone()
    chunk_loss(exact, labels[:4], teacher, config)
    repeated = student.repeat(repeats, 1)
    chunk_loss(repeated, labels[:4].repeat(repeats), sparsify(teacher.repeat(repeats, 1)), config)
    bias = (repeated.view(repeats, 4, VOCAB).mean(0) - exact).abs().max()
    one_bucket = student.clone()
    chunk_loss(
        one_bucket, labels[:4], sparsify(teacher), dataclasses.replace(config, tail_weight=0.0)
    )
    assert bias < 0.005
    assert (one_bucket - exact).abs().max() > 0.02


def test_a_cached_entry_tempers_its_top_k_to_the_dense_probabilities():
    """The stored normalizer makes p^(1/T) of the top k exact, up to the 8-bit codes; the tail as
    one token would be far off.
    """
    teacher = problem()[3]
    fmt = CacheFormat(VOCAB, top_k=8, tail_sample_mass=0, temperature=2.0)
    entries = encode(
        teacher.softmax(1), torch.zeros(ROWS, dtype=torch.long), torch.arange(ROWS), fmt, 0
    )
    targets = decode(entries, fmt)
    cached = (targets.top_k_log_probs / 2 - targets.log_z[:, None]).exp()
    dense = (teacher / 2).softmax(1).gather(1, targets.top_k_ids)
    torch.testing.assert_close(cached, dense, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocabulary_rows_without_mass_do_not_change_the_loss(divergence):
    """A mean over (rows * vocabulary) would halve the loss; padding with logit 0 would give mass to
    no token.
    """
    _, _, labels, teacher = problem()
    z, config = problem(seed=5)[3], LossConfig(divergence=divergence)
    wide = torch.full((ROWS, 128), -1e4)
    narrow = z.clone()
    expected = chunk_loss(narrow, labels, teacher, config)
    for student, wanted in [
        (z.clone(), torch.cat((teacher, wide), 1)),  # the teacher's table is padded
        (torch.cat((z, wide), 1), teacher),  # the student's is
        (torch.cat((z, wide), 1), torch.cat((teacher, wide), 1)),
    ]:
        found = chunk_loss(student, labels, wanted, config)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(student[:, :VOCAB], narrow)


@pytest.mark.parametrize(
    ("divergence", "mode", "temperature"), sorted({row[:3] for row in DIVERGENCE_SETTINGS})
)
def test_at_uncovered_positions_the_hard_label_has_the_full_weight(divergence, mode, temperature):
    """With alpha alone, 0.1 by default, a position without a teacher would be all but lost."""
    hidden, weight, labels, teacher = problem()
    uncovered = torch.arange(ROWS) % 3 == 0
    sparse = dataclasses.replace(sparsify(teacher, temperature), valid_mask=~uncovered)
    config = LossConfig(0.4, 0.6, temperature, mode, None, divergence)

    def parts(h, w):
        of_covered, count = (
            fused_loss(h[~uncovered], w, labels[~uncovered], sparse[~uncovered], config, ROWS)[0],
            int(uncovered.sum()),
        )
        return of_covered + F.cross_entropy(h[uncovered] @ w.t(), labels[uncovered]) * count / ROWS

    ours = grads(lambda h, w: fused_loss(h, w, labels, sparse, config)[0], hidden, weight)
    assert_same(ours, grads(parts, hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail_weight", [0.4, 1.0])
def test_where_the_tail_is_unknown_the_text_is_its_draw(temperature, tail_weight):
    """Without it a position of which little is known would have the whole weight of the teacher and
    teach nothing.
    """
    hidden, weight, labels, teacher = problem()
    known = torch.arange(ROWS) % 2 == 0
    sparse = sparsify(teacher, temperature)
    nothing = torch.arange(ROWS) % 4 == 3  # a tail without mass hides nothing
    sparse = dataclasses.replace(
        sparse,
        num_samples=sparse.num_samples * known,
        valid_mask=torch.arange(ROWS) % 5 != 0,
        log_tail=sparse.log_tail.masked_fill(nothing, -20.0),
    )
    outside = (sparse.top_k_ids != labels[:, None]).all(1)
    unknown = ~known & sparse.valid_mask & ~nothing
    assert (
        (outside & unknown).any()
        and (~outside & unknown).any()
        and (outside & nothing & sparse.valid_mask).any()
    )
    config = LossConfig(0.3, 0.7, temperature, "decoupled", tail_weight)

    def expected(h, w):
        """The teacher's buckets, and cross-entropy inside the tail where the label is there."""
        log_q = (h @ w.t()).log_softmax(1)
        tail = log_q.scatter(1, sparse.top_k_ids, -torch.inf).logsumexp(1)
        inside = tail - log_q.gather(1, labels[:, None])[:, 0]
        stands_in = outside & unknown
        rest = dataclasses.replace(sparse, num_samples=sparsify(teacher).num_samples)
        with_samples = fused_loss(h[known], w, labels[known], rest[known], config, ROWS)[0]
        bucket = dataclasses.replace(config, tail_weight=0.0)
        without = fused_loss(h[~known], w, labels[~known], rest[~known], bucket, ROWS)[0]
        return with_samples + without + 0.7 * tail_weight * inside[stands_in].sum() / ROWS

    ours = grads(lambda h, w: fused_loss(h, w, labels, sparse, config)[0], hidden, weight)
    assert_same(ours, grads(expected, hidden, weight))


def test_without_tail_samples_the_label_is_the_only_one():
    """Half an estimate would not do: the gradient of a softmax sums to zero in each row."""
    _, _, labels, teacher = problem()
    z, sparse = problem(seed=4)[3], sparsify(teacher, tail_samples=0)
    none, label = z.clone(), z.clone()
    outside = (sparse.top_k_ids != labels[:, None]).all(1)
    drawn = dataclasses.replace(sparse, tail_ids=labels[:, None], num_samples=outside.long())
    chunk_loss(none, labels, sparse, LossConfig(0.0, 1.0, tail_weight=1.0))
    chunk_loss(label, labels, drawn, LossConfig(0.0, 1.0, tail_weight=1.0))
    mass = sparse.log_tail.exp()[:, None]  # a label stands in with weight 1, not with the tail's
    stand_in = torch.zeros_like(z).scatter_(1, labels[:, None], -1.0)
    inside = z.softmax(1).scatter(1, sparse.top_k_ids, 0.0)
    stand_in = (stand_in + inside / inside.sum(1, keepdim=True)) * outside[:, None]
    torch.testing.assert_close(none, label + (1 - mass) * stand_in)
    assert none.sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_positions_with_fewer_samples_give_each_a_larger_part(temperature):
    """Against a loop over the positions, each with its own number of samples; ids that do not count
    change nothing.
    """
    _, _, labels, teacher = problem()
    z, sparse = problem(seed=4)[3], sparsify(teacher, temperature)
    counts = torch.arange(ROWS) % TAIL_SAMPLES + 1
    config = LossConfig(0.2, 0.8, temperature, "decoupled", 1.0)
    ours, one_by_one = z.clone(), z.clone()
    sums = chunk_loss(ours, labels, dataclasses.replace(sparse, num_samples=counts), config)
    total = torch.zeros(2)
    for row, count in enumerate(counts.tolist()):
        here, part = slice(row, row + 1), sparse[row : row + 1]
        part = dataclasses.replace(
            part, tail_ids=part.tail_ids[:, :count], num_samples=torch.tensor([count])
        )
        total += torch.stack(chunk_loss(one_by_one[here], labels[here], part, config))
    torch.testing.assert_close(ours, one_by_one)
    torch.testing.assert_close(torch.stack(sums).float(), total)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_and_tail_do_not_collapse_in_training(divergence):
    """200 steps bring and keep the student's mass on the teacher's head where it belongs, from afar
    and from near.

    Reverse KL on a bare truncated head drives the student's mass there to 0 (seen in a peer).
    """
    teacher = problem(rows=6)[3]
    sparse = sparsify(teacher)
    config = LossConfig(0.0, 1.0, 1.0, "decoupled", 0.0, divergence)
    for start in (torch.zeros(6, VOCAB), teacher + 0.5 * problem(seed=8, rows=6)[3]):
        z = start.clone()
        for _ in range(200):
            gradient = z.clone()
            chunk_loss(gradient, torch.zeros(6, dtype=torch.long), sparse, config)
            # jsd is at most log 2, its slopes are small
            z -= (4.0 if divergence == "jsd" else 1.0) * gradient
        student_top_k = z.softmax(1).gather(1, sparse.top_k_ids).sum(1)
        torch.testing.assert_close(student_top_k, 1 - sparse.log_tail.exp(), atol=0.05, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tail_the_student_overrates_is_pushed_down(divergence):
    """The sign of the tail's gradient: a student with more mass outside the top k than the teacher
    must lose it.
    """
    _, _, labels, teacher = problem(rows=6)
    for factor, sign in ((0.2, 1), (4.0, -1)):
        z = factor * teacher
        config = LossConfig(0.0, 1.0, 1.0, "decoupled", 0.0, divergence)
        sparse = sparsify(teacher)
        chunk_loss(z, labels[:6], sparse, config)
        assert (sign * z.scatter(1, sparse.top_k_ids, 0.0).sum(1) > 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tail_without_mass_and_a_masked_teacher_stay_finite(divergence):
    _, _, labels, teacher = problem()
    config = LossConfig(0.0, 1.0, divergence=divergence)
    uncovered = dataclasses.replace(sparsify(teacher), log_tail=torch.full((ROWS,), -60000.0))
    for targets in (uncovered, teacher.index_fill(1, torch.arange(20), -torch.inf)):
        z = problem(seed=3)[3]
        _, kd = chunk_loss(z, labels, targets, config)
        assert torch.isfinite(z).all()
        assert 0 <= kd.item() < 100 * ROWS


def test_the_weight_of_jsd_is_the_teachers():
    """Towards 0 it is forward KL, towards 1 reverse KL, after division by the vanishing weight; as
    in TRL.
    """
    _, _, labels, teacher = problem()

    def kd(**changes):
        student = problem(seed=6)[3].double()
        return chunk_loss(student, labels, teacher, LossConfig(0.0, 1.0, **changes))[1].item()

    assert kd(divergence="jsd", jsd_weight=1e-6) / 1e-6 == pytest.approx(kd(), rel=1e-3)
    assert kd(divergence="jsd", jsd_weight=1 - 1e-6) / 1e-6 == pytest.approx(
        kd(divergence="reverse_kl"), rel=1e-3
    )
    assert kd(divergence="skew_kl", skew=0.0) == pytest.approx(kd())
    assert kd(divergence="skew_reverse_kl", skew=0.0) == pytest.approx(kd(divergence="reverse_kl"))
