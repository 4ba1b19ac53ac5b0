"""Attention by tiles against dense attention in float64 and against finite differences."""

import pytest
import torch
from torch import Tensor

from xinslm.model import attention
from xinslm.model.attention import attend, cut_into_tiles, document_lengths, masked_tiles
from xinslm.model.config import ModelConfig
from xinslm.model.transformer import Transformer

CASES = {
    "one": ([[7]], None),
    "short documents share a tile": ([[3, 1, 2], [1, 5]], None),
    "long and short": ([[40, 2, 3, 25], [70]], None),
    "single tokens": ([[1] * 9], None),
    "window": ([[40, 2, 3, 25], [70]], 5),
    "window longer than a tile": ([[70], [30, 40]], 33),
    "window of one": ([[20]], 1),
}


def inputs(length: int, rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries of 6 heads, keys and values of 2, of size 8."""
    make = torch.Generator().manual_seed(length)
    shapes = [(rows, heads, length, 8) for heads in (6, 2, 2)]
    return [2 * torch.randn(shape, generator=make, dtype=dtype) for shape in shapes]


def allowed(lengths: list[list[int]], window: int | None) -> Tensor:
    """Whether a query sees a key, (B, T, T), one pair at a time."""
    rows = []
    for documents in lengths:
        number = [at for at, count in enumerate(documents) for _ in range(count)]
        size = len(number)
        seen = torch.zeros(size, size, dtype=torch.bool)
        for i in range(size):
            for j in range(i + 1):
                seen[i, j] = number[i] == number[j] and (window is None or i - j < window)
        rows.append(seen)
    return torch.stack(rows)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention with all scores, in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that tests of 70 tokens meet all kinds of tiles."""
    monkeypatch.setattr(attention, "QUERIES", 16)
    monkeypatch.setattr(attention, "MERGED", 8)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_dense_attention(case):
    lengths, window = CASES[case]
    tensors = [x.requires_grad_() for x in inputs(sum(lengths[0]), len(lengths))]
    y = attend(*tensors, cut_into_tiles(lengths, window, 6))
    expected = dense(*tensors, allowed(lengths, window))
    assert torch.allclose(y, expected, rtol=0, atol=1e-13)
    upstream = torch.randn(y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, tensors, upstream)
    for ours, theirs in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_are_finite_differences():
    tensors = [x.requires_grad_() for x in inputs(20, 2)]
    tiles = cut_into_tiles([[20], [3, 4, 13]], 6, 6)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, tiles), tensors)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-6), (torch.bfloat16, 1.6e-2)])
def test_narrow_types_are_computed_in_float32(dtype, error):
    lengths = [[40, 30], [70]]
    tensors = [x.to(dtype).requires_grad_() for x in inputs(70, 2)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    y = attend(*tensors, cut_into_tiles(lengths, None, 6))
    expected = dense(*wide, allowed(lengths, None))
    assert y.dtype == dtype
    assert (y - expected).abs().max() < error
    y.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(tensors, wide, strict=True):
        assert ours.grad.dtype == dtype
        assert (ours.grad - theirs.grad).abs().max() < 4 * error * theirs.grad.abs().max()


def test_autocast_does_not_narrow_the_products():
    tensors = [x.bfloat16().requires_grad_() for x in inputs(40, 1)]
    tiles = cut_into_tiles([[40]], None, 6)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = attend(*tensors, tiles)
            found.append([y, *torch.autograd.grad(y, tensors, torch.ones_like(y))])
    for plain, under in zip(*found, strict=True):
        assert torch.equal(plain, under)


def test_keys_of_a_past_come_before_the_queries(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 1)
    monkeypatch.setattr(attention, "FEWEST", 5)
    q, k, v = inputs(30, 2)
    seen = allowed([[30], [30]], None)
    seen[1, 20:, 3:9] = False
    mask = torch.zeros(2, 18, 30, dtype=torch.float64).masked_fill_(~seen[:, 12:], -torch.inf)
    tiles = masked_tiles(mask, 6)
    assert len(tiles) == 2 * 4
    expected = dense(q, k, v, seen)[:, :, 12:]
    assert torch.allclose(attend(q[:, :, 12:], k, v, tiles), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_tiles_hold_each_query_once_and_few_useless_scores(case):
    lengths, window = CASES[case]
    tiles = cut_into_tiles(lengths, window, 6)
    for row, documents in enumerate(lengths):
        asked = [at for t in tiles if t.row == row for at in range(t.start, t.end)]
        assert asked == list(range(sum(documents)))
    computed = sum((t.end - t.start) * (t.end - t.first) for t in tiles)
    useful = int(allowed(lengths, window).sum())
    most = sum((t.end - t.start) ** 2 for t in tiles)  # above the diagonal, other documents
    assert computed <= useful + most


def test_documents_are_runs_of_equal_numbers():
    segments = torch.tensor([[0, 0, 1, 2, 2, -1], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]])
    assert document_lengths(segments) == [[2, 1, 2, 1], [6], [1] * 6]


@pytest.mark.parametrize("window", [None, 6])
def test_a_model_with_tiles_is_the_model_with_a_mask(window, monkeypatch):
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape, **heads, sliding_window=window)).double()
    ids = torch.randint(0, 50, (2, 40))
    segments = torch.tensor([[0] * 25 + [1] * 3 + [2] * 12, [0] * 38 + [-1] * 2])

    def run() -> list[Tensor]:
        model.zero_grad()
        hidden = model.hidden(ids, segments=segments)
        hidden.square().sum().backward()
        return [hidden.detach(), *(p.grad.clone() for p in model.parameters())]

    found = run()
    assert isinstance(model.attended(ids, segments), tuple)
    monkeypatch.setattr(model, "attended", lambda *_: model.mask(40, 0, segments, ids.device))
    for ours, theirs in zip(found, run(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
