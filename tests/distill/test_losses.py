"""The fused head against dense autograd in float64, finite differences and statistics over draws."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from xinslm.distill.loss_config import LossConfig
from xinslm.distill.losses import DenseTargets, SparseTargets, chunk_loss, fused_loss

ROWS, VOCAB, WIDTH, HEAD, DRAWS = 37, 50, 16, 8, 4


def problem(seed=0, rows=ROWS):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=g)
    weight = torch.randn(VOCAB, WIDTH, generator=g) * 0.5
    labels = torch.randint(0, VOCAB, (rows,), generator=g)
    teacher = torch.randn(rows, VOCAB, generator=g) * 2
    return hidden, weight, labels, teacher


def sparsify(teacher, temperature=2.0, seed=0, draws=DRAWS, head=HEAD):
    log_p = teacher.log_softmax(1)
    top = log_p.topk(head)
    tail = log_p.exp().scatter(1, top.indices, 0.0)
    drawn = torch.multinomial(tail, max(draws, 1), replacement=True, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(len(teacher), dtype=torch.bool)
    log_z = (log_p / temperature).logsumexp(1)
    return SparseTargets(top.indices, top.values, tail.sum(1).log(), drawn[:, :draws], ones, log_z, ones)


def dense_oracle(hidden, weight, labels, teacher, sparse, config):
    """The formulas of the module's text, spelled out over the whole vocabulary in float64 with autograd."""
    z = (hidden @ weight.t()).double()
    t, log_q = config.temperature, z.log_softmax(1)
    ce = F.cross_entropy(z, labels, reduction="sum")
    if sparse is None:
        log_p_t, log_q_t = (teacher.double() / t).log_softmax(1), (z / t).log_softmax(1)
        kd = t * t * (log_p_t.exp() * (log_p_t - log_q_t)).sum()
        return (config.alpha * ce + config.beta * kd) / len(labels)
    in_head = torch.zeros(len(labels), VOCAB, dtype=torch.bool).scatter(1, sparse.head_ids, True)
    if config.temperature_mode == "full":
        p_t, q_t = (teacher.double() / t).softmax(1), (z / t).softmax(1)
        p_h, q_h = p_t.gather(1, sparse.head_ids), q_t.gather(1, sparse.head_ids)
        p_rest, q_rest = (p_t * ~in_head).sum(1), (q_t * ~in_head).sum(1)
        kd = (p_h * (p_h / q_h).log()).sum(1) + p_rest * (p_rest / q_rest).log()
        return (config.alpha * ce + config.beta * t * t * kd.sum()) / len(labels)
    p_head, rest = sparse.head_log_probs.double().exp(), sparse.log_tail.double().exp()
    mass = p_head.sum(1)
    log_q_rest = log_q.masked_fill(in_head, -torch.inf).logsumexp(1)
    log_q_head = log_q.masked_fill(~in_head, -torch.inf).logsumexp(1)
    kd = mass * (mass.log() - log_q_head) + rest * (rest.log() - log_q_rest)
    inner_p = (sparse.head_log_probs.double() / t).log_softmax(1)
    inner_q = (z.gather(1, sparse.head_ids) / t).log_softmax(1)
    kd = kd + mass * t * t * (inner_p.exp() * (inner_p - inner_q)).sum(1)
    kd = kd + config.tail_weight * rest * (log_q_rest - log_q.gather(1, sparse.tail_ids).mean(1))
    return (config.alpha * ce + config.beta * kd.sum()) / len(labels)


def grads(function, hidden, weight):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


CASES = [
    ("decoupled", 1.0, 0.0),
    ("decoupled", 1.0, 1.0),
    ("decoupled", 1.0, 0.3),
    ("decoupled", 2.0, 1.0),
    ("decoupled", 2.0, 0.0),
    ("full", 2.0, 0.0),
    ("dense", 1.0, 0.0),
    ("dense", 2.0, 0.0),
]


@pytest.mark.parametrize(("mode", "temperature", "tail_weight"), CASES)
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("chunk_rows", [10, 256])
def test_loss_and_gradients_equal_the_dense_oracle(mode, temperature, tail_weight, alpha, beta, chunk_rows):
    hidden, weight, labels, teacher = problem()
    kind = "full" if mode == "full" else "decoupled"
    config = LossConfig(alpha, beta, temperature, kind, tail_weight)
    sparse = None if mode == "dense" else sparsify(teacher, temperature)
    targets = DenseTargets(lambda rows: teacher[rows]) if sparse is None else sparse
    ours = grads(lambda h, w: fused_loss(h, w, labels, targets, config, chunk_rows=chunk_rows)[0], hidden, weight)
    dense = grads(lambda h, w: dense_oracle(h, w, labels, teacher, sparse, config), hidden, weight)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=3e-7, rtol=2e-5)


@pytest.mark.parametrize(("mode", "tail_weight"), [("decoupled", 0.5), ("full", 0.0), ("dense", 0.0)])
def test_gradient_at_temperature_2_is_the_slope_of_the_value(mode, tail_weight):
    """T^2 in the value but not in the gradient would show as a ratio of 4 (seen in a peer)."""
    _, _, labels, teacher = problem(rows=5)
    z = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3)).double()
    config = LossConfig(0.0, 1.0, 2.0, "full" if mode == "full" else "decoupled", tail_weight)
    targets = teacher.double() if mode == "dense" else sparsify(teacher, 2.0)
    if isinstance(targets, SparseTargets):
        fields = dataclasses.fields(targets)
        values = {f.name: getattr(targets, f.name) for f in fields}
        targets = SparseTargets(**{k: v.double() if v.is_floating_point() else v for k, v in values.items()})
    gradient = z.clone()
    chunk_loss(gradient, labels[:5], targets, config)
    step = 1e-3
    for row, column in [(0, 0), (1, 7), (2, int(labels[2])), (3, 49), (4, int(teacher[4].argmax()))]:
        values = []
        for sign in (1, -1):
            moved = z.clone()
            moved[row, column] += sign * step
            values.append(chunk_loss(moved, labels[:5], targets, config)[1].item())
        slope = (values[0] - values[1]) / (2 * step)
        assert gradient[row, column].item() == pytest.approx(slope, abs=2e-4)


def test_temperature_is_used():
    hidden, weight, labels, teacher = problem()
    losses = {
        t: fused_loss(hidden, weight, labels, sparsify(teacher), LossConfig(0.0, 1.0, t))[0].item() for t in (1.0, 2.0)
    }
    assert abs(losses[1.0] - losses[2.0]) > 0.01


@pytest.mark.parametrize("mode", ["decoupled", "full", "dense"])
def test_no_gradient_where_the_student_equals_the_teacher(mode):
    """Renormalising a top-k breaks this: the student would be pushed away from the very teacher."""
    teacher = problem()[3]
    z, labels = teacher.clone(), torch.zeros(ROWS, dtype=torch.long)
    config = LossConfig(0.0, 1.0, 2.0, "full" if mode == "full" else "decoupled", 0.0)
    targets = teacher if mode == "dense" else sparsify(teacher)
    _, kd = chunk_loss(z, labels, targets, config)
    assert z.abs().max() < 2e-6
    assert abs(kd.item()) < 1e-4


def test_divergence_is_never_negative_and_needs_no_clamp():
    """A truncated top-k sum is negative wherever the student is surer than the teacher (seen in a peer)."""
    _, _, labels, teacher = problem(rows=200)
    for scale in (0.1, 1.0, 5.0):
        student = scale * torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(2))
        for row in range(0, 200, 20):
            part = slice(row, row + 1)
            config = LossConfig(0.0, 1.0, 1.0, "decoupled", 0.0)
            assert chunk_loss(student[part].clone(), labels[part], sparsify(teacher)[part], config)[1] >= 0


def test_expected_sparse_gradient_is_the_full_vocabulary_one():
    _, _, labels, teacher = problem(rows=4)
    student = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(9))
    config = LossConfig(0.0, 1.0, 1.0, "decoupled", 1.0)
    exact = student.clone()
    chunk_loss(exact, labels[:4], teacher, config)
    total, repeats = torch.zeros_like(student), 3000
    for seed in range(repeats):
        z = student.clone()
        chunk_loss(z, labels[:4], sparsify(teacher, seed=seed), config)
        total += z
    bias = (total / repeats - exact).abs().max()
    one_bucket = student.clone()
    chunk_loss(one_bucket, labels[:4], sparsify(teacher), dataclasses.replace(config, tail_weight=0.0))
    assert bias < 0.01
    assert (one_bucket - exact).abs().max() > 0.02


def test_head_mass_at_temperature_2_equals_dense_softmax():
    """Tempering the tail as if it were one token misses by far: its mass has to come from the stored normaliser."""
    teacher = problem()[3]
    sparse = sparsify(teacher, 2.0)
    cached = (sparse.head_log_probs / 2 - sparse.log_z[:, None]).exp().sum(1)
    dense = (teacher / 2).softmax(1).gather(1, sparse.head_ids).sum(1)
    torch.testing.assert_close(cached, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_micro_batches_of_unequal_size_give_the_gradient_of_the_whole(splits):
    hidden, weight, labels, teacher = problem(rows=40)
    sparse, config = sparsify(teacher), LossConfig()
    whole = grads(lambda h, w: fused_loss(h, w, labels, sparse, config)[0], hidden, weight)
    cuts = [
        0,
        *sorted(torch.randperm(39, generator=torch.Generator().manual_seed(splits))[: splits - 1].add(1).tolist()),
        40,
    ]

    def parts(h, w):
        ranges = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        return sum(fused_loss(h[r], w, labels[r], sparse[r], config, normaliser=40)[0] for r in ranges)

    for a, b in zip(grads(parts, hidden, weight), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_twice_the_rows_do_not_change_the_loss():
    hidden, weight, labels, teacher = problem()
    sparse = sparsify(teacher)
    once = fused_loss(hidden, weight, labels, sparse, LossConfig())[0]
    both = torch.arange(ROWS).repeat(2)
    twice = fused_loss(hidden[both], weight, labels[both], sparse[both], LossConfig())[0]
    torch.testing.assert_close(once, twice)


def test_vocabulary_rows_without_mass_do_not_change_the_loss():
    """A mean over (rows * vocabulary) would halve the loss when the vocabulary doubles."""
    _, _, labels, teacher = problem()
    z = problem(seed=5)[3]
    wide = torch.full((ROWS, VOCAB), -1e4)
    narrow = chunk_loss(z.clone(), labels, teacher, LossConfig())
    padded = chunk_loss(torch.cat((z, wide), 1), labels, torch.cat((teacher, wide), 1), LossConfig())
    for a, b in zip(narrow, padded, strict=True):
        torch.testing.assert_close(a, b)


def test_positions_the_teacher_is_silent_about_have_cross_entropy_alone():
    hidden, weight, labels, teacher = problem()
    sparse = dataclasses.replace(sparsify(teacher), valid=torch.zeros(ROWS, dtype=torch.bool))
    config = LossConfig(alpha=0.4, beta=0.6)
    silent = grads(lambda h, w: fused_loss(h, w, labels, sparse, config)[0], hidden, weight)
    plain = grads(lambda h, w: 0.4 * F.cross_entropy(h @ w.t(), labels), hidden, weight)
    for a, b in zip(silent, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_tied_weight_collects_both_gradients():
    _, weight, labels, teacher = problem()
    ids = torch.arange(ROWS) % VOCAB
    embedding = weight.clone().requires_grad_()
    fused_loss(embedding[ids], embedding, labels, sparsify(teacher), LossConfig())[0].backward()
    other = weight.clone().requires_grad_()
    dense_oracle(other[ids], other, labels, teacher, sparsify(teacher), LossConfig()).backward()
    torch.testing.assert_close(embedding.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_bfloat16_head_gradient_does_not_drift_over_64_chunks():
    hidden, weight, labels, teacher = problem(rows=64 * 32)
    sparse = sparsify(teacher)
    exact = grads(lambda h, w: fused_loss(h, w, labels, sparse, LossConfig(), chunk_rows=32)[0], hidden, weight)[2]
    half = grads(
        lambda h, w: fused_loss(h.bfloat16(), w, labels, sparse, LossConfig(), chunk_rows=32)[0],
        hidden,
        weight,
    )[2]
    assert F.cosine_similarity(exact.flatten().double(), half.flatten().double(), dim=0) > 0.99999


def test_scaled_loss_scales_gradients_and_evaluation_needs_none():
    hidden, weight, labels, teacher = problem()
    sparse = sparsify(teacher)
    one = grads(lambda h, w: fused_loss(h, w, labels, sparse, LossConfig())[0], hidden, weight)
    three = grads(lambda h, w: 3 * fused_loss(h, w, labels, sparse, LossConfig())[0], hidden, weight)
    torch.testing.assert_close(3 * one[1], three[1])
    torch.testing.assert_close(3 * one[2], three[2])
    with torch.no_grad():
        assert fused_loss(hidden, weight, labels, sparse, LossConfig())[0].item() == pytest.approx(one[0].item())


def test_without_draws_the_tail_is_one_bucket():
    """No draws must not leave half an estimate: the gradient of a softmax sums to zero in each row."""
    _, _, labels, teacher = problem()
    z = problem(seed=4)[3]
    none, bucket = z.clone(), z.clone()
    chunk_loss(none, labels, sparsify(teacher, draws=0), LossConfig(0.0, 1.0, tail_weight=1.0))
    chunk_loss(bucket, labels, sparsify(teacher), LossConfig(0.0, 1.0, tail_weight=0.0))
    torch.testing.assert_close(none, bucket)
    assert none.sum(1).abs().max() < 1e-5


def test_full_temperature_refuses_draws():
    hidden, weight, labels, teacher = problem()
    with pytest.raises(ValueError, match="tail_weight"):
        fused_loss(hidden, weight, labels, sparsify(teacher), LossConfig(temperature=2.0, temperature_mode="full"))


def test_memory_does_not_grow_with_the_number_of_rows():
    """A chunked loss that keeps its graph would hold (rows, vocabulary) after all."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and VOCAB in tensor.shape:
                    self.numel = max(self.numel, tensor.numel())
            return out

    largest = {}
    for rows in (512, 4096):
        hidden, weight, labels, teacher = problem(rows=rows)
        sparse = sparsify(teacher)
        hidden.requires_grad_()
        with Largest() as seen:
            fused_loss(hidden, weight, labels, sparse, LossConfig(), chunk_rows=64)[0].backward()
        largest[rows] = seen.numel
    assert largest[512] == largest[4096] == 64 * VOCAB


def test_a_bare_head_does_not_collapse_in_training():
    """200 steps on head and tail alone keep the student's mass on the teacher's head where it belongs."""
    teacher = problem(rows=6)[3]
    z = torch.zeros(6, VOCAB)
    config = LossConfig(0.0, 1.0, 1.0, "decoupled", 0.0)
    sparse = sparsify(teacher)
    for _ in range(200):
        gradient = z.clone()
        chunk_loss(gradient, torch.zeros(6, dtype=torch.long), sparse, config)
        z -= 2.0 * gradient
    student_head = z.softmax(1).gather(1, sparse.head_ids).sum(1)
    torch.testing.assert_close(student_head, 1 - sparse.log_tail.exp(), atol=0.02, rtol=0)
