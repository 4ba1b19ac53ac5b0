"""The fused head around the losses: chunks, micro-batches, precision, memory, bias, soft caps, what
is refused.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from loss_oracle import (
    DIVERGENCES,
    ROWS,
    VOCAB,
    assert_same,
    dense_oracle,
    grads,
    in_double,
    problem,
    sparsify,
)
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import HeadOptions, fused_loss
from xinslm.losses.memory import HeadMemory
from xinslm.losses.targets import DenseTargets


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_micro_batches_of_unequal_size_give_the_gradient_of_the_whole(splits):
    hidden, weight, labels, teacher = problem(rows=40)
    sparse, config = sparsify(teacher), LossConfig()
    whole = grads(lambda h, w: fused_loss(h, w, labels, sparse, config)[0], hidden, weight)
    cuts = [
        0,
        *sorted(
            torch.randperm(39, generator=torch.Generator().manual_seed(splits))[: splits - 1]
            .add(1)
            .tolist()
        ),
        40,
    ]

    def parts(h, w):
        ranges = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        return sum(
            fused_loss(h[r], w, labels[r], sparse[r], config, normaliser=40)[0] for r in ranges
        )

    for a, b in zip(grads(parts, hidden, weight), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_twice_the_rows_do_not_change_the_loss():
    hidden, weight, labels, teacher = problem()
    sparse = sparsify(teacher)
    once = fused_loss(hidden, weight, labels, sparse, LossConfig())[0]
    both = torch.arange(ROWS).repeat(2)
    twice = fused_loss(hidden[both], weight, labels[both], sparse[both], LossConfig())[0]
    torch.testing.assert_close(once, twice)


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
    exact = grads(
        lambda h, w: fused_loss(
            h, w, labels, sparse, LossConfig(), head=HeadOptions(chunk_rows=32)
        )[0],
        hidden,
        weight,
    )[2]
    half = grads(
        lambda h, w: fused_loss(
            h.bfloat16(), w, labels, sparse, LossConfig(), head=HeadOptions(chunk_rows=32)
        )[0],
        hidden,
        weight,
    )[2]
    assert F.cosine_similarity(exact.flatten().double(), half.flatten().double(), dim=0) > 0.99999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_memory_changes_nothing_and_holds_no_gradient(dtype):
    head = HeadOptions(memory=HeadMemory(), chunk_rows=16)
    results = []
    for rows in (40, 24, 56):
        hidden, weight, labels, teacher = problem(rows=rows)
        sparse = sparsify(teacher)

        def ours(h, w, head=head, labels=labels, sparse=sparse):
            return fused_loss(h.to(dtype), w, labels, sparse, LossConfig(), head=head)[0]

        def fresh(h, w, labels=labels, sparse=sparse):
            alone = HeadOptions(chunk_rows=16)
            return fused_loss(h.to(dtype), w, labels, sparse, LossConfig(), head=alone)[0]

        results += zip(grads(ours, hidden, weight), grads(fresh, hidden, weight), strict=True)
    for kept, alone in results:  # after the last, so that nothing may have been written over
        assert torch.equal(torch.as_tensor(kept), torch.as_tensor(alone))


def test_scaled_loss_scales_gradients_and_evaluation_needs_none():
    hidden, weight, labels, teacher = problem()
    sparse = sparsify(teacher)
    one = grads(lambda h, w: fused_loss(h, w, labels, sparse, LossConfig())[0], hidden, weight)
    three = grads(
        lambda h, w: 3 * fused_loss(h, w, labels, sparse, LossConfig())[0], hidden, weight
    )
    torch.testing.assert_close(3 * one[1], three[1])
    torch.testing.assert_close(3 * one[2], three[2])
    with torch.no_grad():
        assert fused_loss(hidden, weight, labels, sparse, LossConfig())[0].item() == pytest.approx(
            one[0].item()
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"temperature": 2.0, "temperature_mode": "full", "tail_weight": 1.0},
            "no tail samples at T",
        ),
        ({"divergence": "reverse_kl", "tail_weight": 0.5}, "cannot use tail samples"),
        ({"divergence": "jsd", "temperature": 2.0}, "chain rule of forward_kl"),
        ({"divergence": "jsd", "jsd_weight": 0.0}, "jsd_weight is 0.0, but must be above 0"),
        ({"divergence": "skew_kl", "skew": 1.0}, "skew is 1.0, but must be below 1"),
        ({"alpha": 0.0, "beta": 0.0}, "both 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    hidden, weight, labels, teacher = problem()
    config = LossConfig(**changes)
    assert any(message in wrong for wrong in config.errors())
    with pytest.raises(ValueError, match=message):
        fused_loss(hidden, weight, labels, sparsify(teacher), config)


def test_tail_samples_count_by_default_where_they_can():
    weights = {
        (divergence, mode): LossConfig(
            divergence=divergence, temperature=2.0, temperature_mode=mode
        ).effective_tail_weight
        for divergence in DIVERGENCES
        for mode in ("decoupled", "full")
    }
    assert weights.pop(("forward_kl", "decoupled")) == 1.0
    assert set(weights.values()) == {0.0}
    assert LossConfig(tail_weight=0.25).effective_tail_weight == 0.25


def test_labels_outside_the_vocabulary_are_refused():
    hidden, weight, labels, _ = problem()
    for wrong in (-100, VOCAB):
        labels[3] = wrong
        with pytest.raises(ValueError, match="labels must be ids below 50"):
            fused_loss(hidden, weight, labels, None, LossConfig())


def peak_memory(function) -> int:
    """Bytes of tensors alive at once, at most, while `function` runs, by the allocator's own
    events.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [
        event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    assert events
    return max(
        itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    )


@pytest.mark.parametrize("kind", ["sparse", "full", "dense"])
def test_memory_does_not_grow_with_the_number_of_rows(kind):
    """A chunked loss that keeps its graph would hold (rows, vocabulary) after all."""
    vocabulary, width, chunk, peaks = 4000, 8, 32, {}
    config = {
        "sparse": LossConfig(),
        "full": LossConfig(temperature=2.0, temperature_mode="full", divergence="jsd"),
        "dense": LossConfig(divergence="reverse_kl"),
    }[kind]
    weight = torch.randn(vocabulary, width, requires_grad=True)
    for rows in (512, 1024):
        hidden, labels = (
            torch.randn(rows, width, requires_grad=True),
            torch.zeros(rows, dtype=torch.long),
        )
        teacher = torch.randn(rows, width)
        targets = DenseTargets(lambda part, teacher=teacher: teacher[part] @ weight.detach().t())
        if kind != "dense":
            targets = sparsify(torch.randn(1, vocabulary))[torch.zeros(rows, dtype=torch.long)]
        peaks[rows] = peak_memory(
            lambda h=hidden, y=labels, t=targets: fused_loss(
                h, weight, y, t, config, head=HeadOptions(chunk_rows=chunk)
            )[0].backward()
        )
    blocks = {"sparse": 1, "full": 2, "dense": 12}[kind]
    assert peaks[1024] - peaks[512] < 0.1 * 4 * 512 * vocabulary
    # with the head's gradient and its copy
    assert peaks[512] < 4 * vocabulary * (blocks * chunk + 3 * width)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_bias_and_soft_capped_logits(divergence, sparse):
    """Both are often forgotten on the fused path of others, which then trains another model than
    the one that runs.
    """
    hidden, weight, labels, teacher = problem()
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    config = LossConfig(0.3, 0.7, 2.0, "full", divergence=divergence)
    cached = sparsify(teacher) if sparse else None
    targets = cached if sparse else DenseTargets(lambda rows: teacher[rows])
    ours = grads(
        lambda h, w, b: fused_loss(h, w, labels, targets, config, head=HeadOptions(b, 3.0, 10))[0],
        hidden,
        weight,
        bias,
    )
    expected = grads(
        lambda h, w, b: dense_oracle(h, w, labels, teacher, cached, config, b, 3.0),
        hidden,
        weight,
        bias,
    )
    assert_same(ours, expected, atol=1e-6)


def test_an_adapter_on_the_head_is_trained():
    """Reading a layer's `weight` past its adapter is a trap; a computed weight hands its gradient
    on.
    """
    hidden, weight, labels, teacher = problem()
    left, right = 0.1 * torch.randn(VOCAB, 2), 0.1 * torch.randn(2, weight.shape[1])
    sparse, config = sparsify(teacher), LossConfig()
    ours = grads(
        lambda a, b: fused_loss(hidden, weight + a @ b, labels, sparse, config)[0], left, right
    )
    theirs = grads(
        lambda a, b: dense_oracle(hidden, weight + a @ b, labels, teacher, sparse, config),
        left,
        right,
    )
    assert_same(ours, theirs, atol=1e-6)
    assert ours[1].abs().max() > 1e-4


def test_no_rows_give_no_loss_and_a_second_backward_says_why_not():
    hidden, weight, labels, teacher = problem()
    leaf = weight.clone().requires_grad_()
    loss, metrics = fused_loss(hidden[:0], leaf, labels[:0], sparsify(teacher)[:0], LossConfig())
    loss.backward()
    assert (loss.item(), metrics.ce, metrics.kd, leaf.grad.abs().max().item()) == (
        0.0,
        0.0,
        0.0,
        0.0,
    )
    loss, _ = fused_loss(hidden, leaf, labels, sparsify(teacher), LossConfig())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.backward()


def test_double_precision_stays_double():
    hidden, weight, labels, teacher = problem()
    sparse = in_double(sparsify(teacher.double()))
    for config in (
        LossConfig(divergence="skew_kl"),
        LossConfig(temperature=2.0, temperature_mode="full"),
    ):
        leaves = hidden.double(), weight.double()
        ours = grads(lambda h, w, c=config: fused_loss(h, w, labels, sparse, c)[0], *leaves)
        theirs = grads(
            lambda h, w, c=config: dense_oracle(h, w, labels, teacher, sparse, c), *leaves
        )
        assert_same(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_large_vocabularys_dense_loss_keeps_the_tails_small_terms(temperature):
    """A float32 dot product over 49,152 tokens loses terms that are small against its partial sum:
    1.6e-1 of this loss; 2.5e-3 on a real model's distributions.
    """
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(16, 49_152, generator=draw) * 1.5 + 12
    z[:, :4] += 13 + torch.rand(16, 4, generator=draw)
    teacher = z + torch.randn(16, 49_152, generator=draw) * 0.3
    labels = torch.zeros(16, dtype=torch.int64)
    eye = torch.eye(16)
    config = LossConfig(0.0, 1.0, temperature)
    found = fused_loss(eye, z.t().contiguous(), labels, teacher, config)[0].item()
    log_p, log_q = ((x.double() / temperature).log_softmax(1) for x in (teacher, z))
    exact = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    assert found == pytest.approx(exact, abs=5e-6)
