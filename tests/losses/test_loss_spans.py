"""Likelihoods of whole spans (ALM) in the fused head, against their definition in float64 and
finite differences.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from loss_oracle import DIVERGENCES, ROWS, VOCAB, assert_same, grads, plain_divergence, problem
from xinslm.losses.chunk import chunk_loss
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import fused_loss
from xinslm.losses.targets import SpanTargets

SPANS = torch.tensor(
    [0, 0, -1, 1, 2, 2, 2, 5, 5, -1, -1, 6]
    + [7] * 13
    + [8, 8, 9, -1, 10, 11, 11, 11, 11, -1, 12, 12]
)
"""13 positions of one span are more than the chunks of the tests hold."""


def span_targets(seed=0):
    """Each span a likelihood, the same on all its positions; NaN where there is no span."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.bincount(SPANS[SPANS >= 0])
    of_span = -torch.rand(len(lengths), generator=g) * 6 * lengths
    return SpanTargets(SPANS, torch.where(SPANS >= 0, of_span[SPANS.clamp_min(0)], torch.nan))


def oracle(hidden, weight, labels, targets, config):
    z = (hidden @ weight.t()).double()
    at_label = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    tau, kd = config.span_temperature, 0.0
    for span in targets.spans[targets.spans >= 0].unique():
        here = targets.spans == span
        p = (targets.log_probs[here][0].double() / tau).exp()
        q = (at_label[here].sum() / tau).exp()
        pair_p, pair_q = torch.stack((p, 1 - p))[None], torch.stack((q, 1 - q))[None]
        kd = kd + tau * plain_divergence(pair_p, pair_q, config).sum()
    kd = kd - at_label[targets.spans < 0].sum()  # outside spans the text stands in
    return (config.alpha * F.cross_entropy(z, labels, reduction="sum") + config.beta * kd) / len(
        labels
    )


@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_equal_the_definition(divergence, alpha, tau):
    hidden, weight, labels, _ = problem()
    targets = span_targets()
    config = LossConfig(alpha, 0.7, divergence=divergence, jsd_weight=0.3, span_temperature=tau)
    expected = grads(lambda h, w: oracle(h, w, labels, targets, config), hidden, weight)
    for chunk_rows in (256, 7, 3, 1):
        ours = grads(
            lambda h, w, n=chunk_rows: fused_loss(h, w, labels, targets, config, chunk_rows=n)[0],
            hidden,
            weight,
        )
        assert_same(ours, expected, atol=2e-5, rtol=2e-3)  # the margin below 1 shifts a little


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_is_the_slope_of_the_value(divergence):
    _, _, labels, _ = problem()
    z, targets = problem(seed=4)[3].double(), span_targets()
    config = LossConfig(0.0, 1.0, divergence=divergence, span_temperature=20.0)
    gradient, step = z.clone(), 1e-5
    chunk_loss(gradient, labels, targets, config)
    for row, column in [
        (0, 3),
        (1, int(labels[1])),
        (2, int(labels[2])),
        (15, 7),
        (20, int(labels[20])),
        (36, 0),
    ]:
        values = []
        for sign in (1, -1):
            moved = z.clone()
            moved[row, column] += sign * step
            values.append(chunk_loss(moved, labels, targets, config)[1].item())
        assert gradient[row, column].item() == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9
        )
    outside = SPANS < 0
    torch.testing.assert_close(
        gradient[outside], z[outside].softmax(1) - F.one_hot(labels[outside], VOCAB)
    )


def own_likelihoods(z, labels):
    """Targets of a teacher that finds every span as likely as the student with logits `z` does."""
    at_label = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    inside = SPANS >= 0
    of_span = torch.zeros(int(SPANS.max()) + 1, dtype=z.dtype).index_add(
        0, SPANS[inside], at_label[inside]
    )
    return SpanTargets(SPANS, of_span[SPANS.clamp_min(0)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_gradient_where_student_and_teacher_agree(divergence):
    _, _, labels, _ = problem()
    z = problem(seed=4)[3].double()
    targets, outside = own_likelihoods(z, labels), SPANS < 0
    text = F.cross_entropy(z[outside], labels[outside], reduction="sum").item()
    _, kd = chunk_loss(z, labels, targets, LossConfig(0.0, 1.0, divergence=divergence))
    assert z[~outside].abs().max() < 1e-9
    assert kd.item() == pytest.approx(text, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(DIVERGENCES),
    st.floats(1.0, 200.0),
    st.floats(0.0, 40.0),
    st.integers(0, 2**31 - 1),
)
def test_never_negative_and_finite(divergence, tau, sharp, seed):
    """Also for a teacher that is certain and a student that is."""
    g = torch.Generator().manual_seed(seed)
    z, labels = (
        sharp * torch.randn(ROWS, VOCAB, generator=g),
        torch.randint(0, VOCAB, (ROWS,), generator=g),
    )
    z[15:].scatter_(1, labels[15:, None], 60.0)
    targets = span_targets(seed % 97)
    targets = SpanTargets(SPANS, torch.where((SPANS > 0) & (SPANS < 8), 1e-4, targets.log_probs))
    _, kd = chunk_loss(
        z, labels, targets, LossConfig(0.1, 0.9, divergence=divergence, span_temperature=tau)
    )
    assert kd.item() >= -1e-7
    assert torch.isfinite(z).all()


def test_the_root_of_likelihoods_leaves_the_gradients_size_alone():
    """For a large root a span counts a log(a/b) - a + b, with a and b the negative
    log-likelihoods.
    """
    _, _, labels, _ = problem()
    z, targets = problem(seed=4)[3].double(), span_targets()
    config = LossConfig(0.0, 1.0, span_temperature=1e4)
    _, kd = chunk_loss(z.clone(), labels, targets, config)
    starts = targets.starts()
    a, b = -targets.log_probs[starts].double(), -own_likelihoods(z, labels).log_probs[starts]
    text = F.cross_entropy(z[SPANS < 0], labels[SPANS < 0], reduction="sum").item()
    assert kd.item() - text == pytest.approx((a * (a / b).log() - a + b).sum().item(), rel=2e-2)


def test_training_on_spans_alone_brings_the_likelihoods_together():
    _, _, labels, _ = problem()
    z, targets = (
        torch.zeros(ROWS, VOCAB).double(),
        own_likelihoods(problem(seed=4)[3].double(), labels),
    )
    for _ in range(800):
        gradient = z.clone()
        chunk_loss(gradient, labels, targets, LossConfig(0.0, 1.0))
        z -= gradient
    starts = targets.starts()
    torch.testing.assert_close(
        own_likelihoods(z, labels).log_probs[starts], targets.log_probs[starts], atol=0.1, rtol=0
    )


def test_spans_that_are_torn_and_temperatures_are_refused():
    hidden, weight, labels, _ = problem(rows=4)
    for spans in ([0, 1, 0, 2], [3, 3, 2, 2], [1, -1, 1, 2]):
        with pytest.raises(ValueError, match="contiguous"):
            fused_loss(
                hidden,
                weight,
                labels,
                SpanTargets(torch.tensor(spans), torch.zeros(4)),
                LossConfig(),
            )
    whole = SpanTargets(torch.tensor([0, 0, 1, 1]), torch.full((4,), -1.0))
    with pytest.raises(ValueError, match="span_temperature"):
        fused_loss(hidden, weight, labels, whole, LossConfig(temperature=2.0))
