"""The loss over buckets of tokens, against sets of tokens spelled out one by one and autograd in
float64.
"""

import itertools

import pytest
import torch

from xinslm.losses import BucketTargets, LossConfig, fused_loss

PIECES = sorted(
    {"".join(p) for n in (1, 2, 3) for p in itertools.product("abc", repeat=n)}
    - {"ac", "bcb", "cca"}
)


def begin_with(x):
    places = [i for i, piece in enumerate(PIECES) if piece.startswith(x)]
    return places[0], places[-1] + 1


def alone(piece):
    return PIECES.index(piece), PIECES.index(piece) + 1


def rows_of(*rows, order=None):
    """Rows of (range, level, onward, share) as targets; the vocabulary is PIECES in some order and
    one token more.
    """
    most = max(len(row) for row in rows)
    begins, ends, levels = (torch.zeros(len(rows), most, dtype=torch.int64) for _ in range(3))
    probs, onward = torch.zeros(len(rows), most), torch.zeros(len(rows), most, dtype=torch.bool)
    for number, row in enumerate(rows):
        for column, ((begin, end), level, further, share) in enumerate(row):
            begins[number, column], ends[number, column], levels[number, column] = begin, end, level
            onward[number, column], probs[number, column] = further, share
    return BucketTargets(
        order, begins, ends, probs, levels, onward, torch.tensor([bool(row) for row in rows])
    )


ROWS = (
    [
        (begin_with("a"), 0, True, 0.6),
        (begin_with("c"), 0, False, 0.1),
        (begin_with("bb"), 0, False, 0.2),
        (begin_with("ab"), 1, True, 0.5),
        (alone("a"), 1, False, 0.2),
        (begin_with("aa"), 1, False, 0.1),
        (alone("abc"), 2, False, 0.7),
        (alone("ab"), 2, False, 0.3),
    ],
    [
        (begin_with("b"), 0, False, 0.25),
        (begin_with("ba"), 0, False, 0.25),
        (alone("baa"), 0, True, 0.125),
    ],
    [],
    [
        (alone("c"), 0, False, 0.875),
        (begin_with("ca"), 0, True, 0.1),
        (alone("caa"), 1, False, 0.9),
    ],
)


def divergence(p, q, name):
    p, q = torch.stack(p), torch.stack(q)
    if name == "forward_kl":
        return (p * (p / q).log()).sum()
    if name == "reverse_kl":
        return (q * (q / p).log()).sum()
    m = 0.5 * p + 0.5 * q
    return 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()


def oracle(logits, labels, rows, order, config):
    """Level by level: the tokens of each bucket as a set, the rest of the level's set, and what is
    left out.
    """
    log_q = torch.log_softmax(logits, dim=1)
    total = 0.0
    for number, row in enumerate(rows):
        ce = -log_q[number, labels[number]]
        q = log_q[number].exp()
        kd = 0.0 if row else ce
        inside = set(range(logits.shape[1]))
        for level in range(1 + max((entry[1] for entry in row), default=-1)):
            mine = [entry for entry in row if entry[1] == level]
            sets, used = [], set()
            for place, _, further, share in mine:
                tokens = {int(order[i]) for i in range(*place)}
                if not further:
                    smaller = [
                        e[0]
                        for e in row
                        if e[0] != place and place[0] <= e[0][0] and e[0][1] <= place[1]
                    ]
                    tokens -= {int(order[i]) for other in smaller for i in range(*other)}
                sets.append((tokens, share))
            whole = sum(q[t] for t in inside)
            for tokens, _ in sets:
                used |= tokens
            sets.append((inside - used, 1 - sum(share for _, share in sets)))
            p, mass = [], []
            for tokens, share in sets:
                if tokens:
                    p.append(torch.tensor(max(share, 2e-9), dtype=logits.dtype))
                    mass.append(sum(q[t] for t in tokens) / whole)
            kd = kd + divergence(p, mass, config.divergence)
            onward = [sets[k][0] for k, entry in enumerate(mine) if entry[2]]
            inside = onward[0] if onward else inside
        total = total + (config.alpha * ce + config.beta * kd)
    return total / len(rows)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_value_and_gradient_are_the_oracles(name):
    torch.manual_seed(0)
    order = torch.randperm(len(PIECES) + 1)
    hidden = torch.randn(len(ROWS), 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(order), 12, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 4, 2, 7])
    config = LossConfig(alpha=0.3, beta=0.7, divergence=name)
    loss, _ = fused_loss(hidden, weight, labels, rows_of(*ROWS, order=order), config)
    ours = torch.autograd.grad(loss, (hidden, weight))
    wanted = oracle(hidden @ weight.t(), labels, ROWS, order, config)
    theirs = torch.autograd.grad(wanted, (hidden, weight))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-7)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_levels_add_up_to_the_divergence_of_whole_tokens_on_average():
    """Pairs of letters: level 0 is the first, level 1 the second behind the text's own first
    one.
    """
    torch.manual_seed(1)
    letters = "abcd"
    p = torch.rand(4, 4, dtype=torch.float64)
    p /= p.sum()
    hidden, weight = torch.randn(1, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    log_q = torch.log_softmax(hidden @ weight.t(), dim=1).view(4, 4)
    expected = 0.0
    for first in range(len(letters)):
        mine = slice(4 * first, 4 * first + 4)
        row = [((4 * i, 4 * i + 4), 0, i == first, float(p[i].sum())) for i in range(4)]
        row += [
            ((4 * first + j, 4 * first + j + 1), 1, False, float(p[first, j] / p[first].sum()))
            for j in range(4)
        ]
        targets = rows_of(row, order=torch.arange(16))
        label = torch.tensor([mine.start])
        _, metrics = fused_loss(hidden, weight, label, targets, LossConfig(alpha=0.0, beta=1.0))
        expected += float(p[first].sum()) * metrics.kd
    assert expected == pytest.approx(float((p * (p.log() - log_q)).sum()), abs=1e-6)


def test_nothing_is_taught_where_the_student_is_the_teacher():
    torch.manual_seed(2)
    hidden = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(PIECES), 8, dtype=torch.float64, requires_grad=True)
    q = torch.softmax(hidden @ weight.t(), dim=1)[0].detach()
    mass = lambda place: float(q[place[0] : place[1]].sum())  # noqa: E731
    inside = begin_with("ab")
    row = [(begin_with(x), 0, x == "a", mass(begin_with(x))) for x in "abc"]
    row += [(inside, 1, True, mass(inside) / mass(begin_with("a")))]
    row += [(alone(x), 2, False, mass(alone(x)) / mass(inside)) for x in ("ab", "aba")]
    targets = rows_of(row, order=torch.arange(len(PIECES)))
    loss, _ = fused_loss(
        hidden, weight, torch.tensor([0]), targets, LossConfig(alpha=0.0, beta=1.0)
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-7)
    assert hidden.grad.abs().max() < 1e-6 and weight.grad.abs().max() < 1e-6


def test_groups_have_no_temperature():
    targets = rows_of(*ROWS, order=torch.arange(len(PIECES)))
    with pytest.raises(ValueError, match="inside a bucket of tokens are known at temperature 1"):
        labels = torch.zeros(4, dtype=torch.int64)
        fused_loss(
            torch.randn(4, 8),
            torch.randn(len(PIECES), 8),
            labels,
            targets,
            LossConfig(temperature=2.0),
        )
