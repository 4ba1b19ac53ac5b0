"""The losses spelled out over the whole vocabulary in float64 with autograd, and problems to
compare them on.
"""

import dataclasses

import torch
import torch.nn.functional as F

from xinslm.losses.targets import SparseTargets

ROWS, VOCAB, WIDTH, TOP_K, TAIL_SAMPLES = 37, 50, 16, 8, 4
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")


def problem(seed=0, rows=ROWS):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=g)
    weight = torch.randn(VOCAB, WIDTH, generator=g) * 0.5
    labels = torch.randint(0, VOCAB, (rows,), generator=g)
    teacher = torch.randn(rows, VOCAB, generator=g) * 2
    return hidden, weight, labels, teacher


def sparsify(teacher, temperature=2.0, seed=0, tail_samples=TAIL_SAMPLES, top_k=TOP_K):
    log_p = teacher.log_softmax(1)
    top = log_p.topk(top_k)
    tail = log_p.exp().scatter(1, top.indices, 0.0)
    drawn = torch.multinomial(
        tail, max(tail_samples, 1), replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    ones = torch.ones(len(teacher), dtype=torch.bool)
    counts = torch.full((len(teacher),), tail_samples)
    log_z = (log_p / temperature).logsumexp(1)
    return SparseTargets(
        top.indices, top.values, tail.sum(1).log(), drawn[:, :tail_samples], counts, log_z, ones
    )


def in_double(sparse):
    values = {f.name: getattr(sparse, f.name) for f in dataclasses.fields(sparse)}
    return SparseTargets(
        **{k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    )


def plain_divergence(p, q, config):
    """Each row's divergence of two tables of probabilities, by the definitions."""

    def kl(a, b):
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(1)

    w, a = config.jsd_weight, config.skew
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: w * kl(p, w * p + (1 - w) * q) + (1 - w) * kl(q, w * p + (1 - w) * q),
        "skew_kl": lambda: kl(p, a * p + (1 - a) * q),
        "skew_reverse_kl": lambda: kl(q, a * q + (1 - a) * p),
    }[config.divergence]()


def plain_kd(z, teacher, sparse, config):
    """KD of each row, without T^2: dense where `sparse` is None."""
    t, tempered = config.temperature, config.temperature_mode == "full"
    if sparse is None:
        return (
            t * t * plain_divergence((teacher.double() / t).softmax(1), (z / t).softmax(1), config)
        )
    ids = sparse.top_k_ids

    def buckets(probs):
        top_k_probs = probs.gather(1, ids)
        return torch.cat((top_k_probs, probs.scatter(1, ids, 0.0).sum(1, keepdim=True)), 1)

    if tempered:
        return (
            t
            * t
            * plain_divergence(
                buckets((teacher.double() / t).softmax(1)), buckets((z / t).softmax(1)), config
            )
        )
    p, q = buckets(teacher.double().softmax(1)), buckets(z.softmax(1))
    rest = p[:, -1]
    if t == 1:
        kd = plain_divergence(p, q, config)
    else:
        split_p, split_q = (
            torch.stack((1 - rest, rest), 1),
            torch.stack((q[:, :-1].sum(1), q[:, -1]), 1),
        )
        inner_p = (teacher.double().gather(1, ids) / t).softmax(1)
        inner_q = (z.gather(1, ids) / t).softmax(1)
        kd = plain_divergence(split_p, split_q, config)
        kd = kd + (1 - rest) * t * t * plain_divergence(inner_p, inner_q, config)
    weight = (
        config.tail_weight
        if config.tail_weight is not None
        else float(config.divergence == "forward_kl")
    )
    if weight and sparse.tail_ids.shape[1]:
        kd = kd + weight * rest * (
            q[:, -1:].log() - z.log_softmax(1).gather(1, sparse.tail_ids)
        ).mean(1)
    return kd


def dense_oracle(hidden, weight, labels, teacher, sparse, config, bias=None, softcap=None):
    z = (hidden @ weight.t()).double()
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    ce = F.cross_entropy(z, labels, reduction="sum")
    kd = plain_kd(z, teacher, sparse, config).sum()
    return (config.alpha * ce + config.beta * kd) / len(labels)


def grads(function, *leaves):
    """Value and gradients of `function` at copies of `leaves`."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def assert_same(ours, theirs, atol=3e-7, rtol=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=atol, rtol=rtol)
