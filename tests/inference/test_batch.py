"""Batched generation: the engine's own greedy text, draws that no neighbour changes, and what it
costs.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from small_models import make_config, save_random_model
from xinslm.draw import choose, kept_tokens
from xinslm.errors import UsageError, XinslmError
from xinslm.inference import batch
from xinslm.inference.batch import BatchOptions, generate_batch
from xinslm.inference.sampling import Sampler
from xinslm.inference.torch_engine import TorchEngine
from xinslm.model.config import ModelConfig
from xinslm.model.files import load_model
from xinslm.model.transformer import Transformer
from xinslm.sampling import Sampling
from xinslm.topk import blocked_topk

GREEDY = Sampling(temperature=0)
FREE = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
NONE: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load_model(folder)


def make_prompts(count: int, low: int = 3, high: int = 20, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 320, rng.integers(low, high)) for _ in range(count)]


def one_by_one(
    engine: TorchEngine, prompt: np.ndarray, limit: int, ends: frozenset[int]
) -> list[int]:
    engine.reset()
    logits, tokens = engine.start(prompt.tolist()), []
    while True:
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends or len(tokens) == limit or engine.position == engine.context_length:
            return tokens
        logits = engine.step(tokens[-1])


@pytest.mark.parametrize("window", [None, 9])
def test_greedy_text_is_the_engines(tmp_path: Path, window: int | None) -> None:
    """Uneven prompts, rows that end at different times, more prompts than rows, a context that runs
    full.
    """
    save_random_model(tmp_path, sliding_window=window, max_position_embeddings=40)
    engine = TorchEngine.load(tmp_path, "cpu")
    prompts = make_prompts(23)
    free = [one_by_one(engine, prompt, 12, NONE) for prompt in prompts]
    ends = frozenset({free[0][2], free[5][7], free[9][4]})
    result = generate_batch(load_model(tmp_path), prompts, GREEDY, 30, ends, BatchOptions(rows=8))
    expected = [one_by_one(engine, prompt, 30, ends) for prompt in prompts]
    assert [c.tokens.tolist() for c in result.texts] == expected
    assert [c.ended for c in result.texts] == [text[-1] in ends for text in expected]
    assert 3 <= sum(c.ended for c in result.texts) < 23, "some rows must leave early, some must not"
    assert any(
        len(p) + len(t) == 41 and len(t) < 30 for p, t in zip(prompts, expected, strict=True)
    )


def test_real_model_tells_the_engines_story(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    engine = TorchEngine.load(folder, "cpu")
    prompts = [
        np.array([1, *engine.tokenizer.encode(text)])
        for text in ("Once upon a time", "Lily", "The big dog ran")
    ]
    result = generate_batch(load_model(folder), prompts, GREEDY, 60, frozenset({1, 2}))
    assert [c.tokens.tolist() for c in result.texts] == [
        one_by_one(engine, p, 60, frozenset({1, 2})) for p in prompts
    ]


def test_a_text_depends_on_its_number_and_the_seed_alone(model: Transformer) -> None:
    prompts = make_prompts(12)
    ends = frozenset(range(60, 75))  # rows end all the time, so that places are shuffled
    whole = generate_batch(model, prompts, FREE, 25, ends, BatchOptions(rows=12)).texts
    for rows in (1, 5):
        again = generate_batch(model, prompts, FREE, 25, ends, BatchOptions(rows=rows)).texts
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(whole, again, strict=True))
    last = generate_batch(model, prompts[7:], FREE, 25, ends, BatchOptions(first_index=7)).texts
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(whole[7:], last, strict=True))
    same = generate_batch(model, [prompts[0]] * 6, FREE, 25, ends).texts
    assert len({tuple(c.tokens.tolist()) for c in same}) == 6, (
        "the same prompt, another number: another text"
    )
    other = generate_batch(model, prompts, Sampling(**{**vars(FREE), "seed": 4}), 25, ends).texts
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(whole, other, strict=True))


def test_every_token_goes_through_the_model_once(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache, 16 + 24 tokens would cost 16 + 17 + ... = 660 forwards of a token a
    sequence.
    """
    seen = []
    real = model.model.layers[0].forward
    monkeypatch.setattr(
        model.model.layers[0],
        "forward",
        lambda x, *rest: seen.append(x.shape[:2].numel()) or real(x, *rest),
    )
    prompts = make_prompts(10, low=16, high=17)
    result = generate_batch(model, prompts, GREEDY, 24, NONE, BatchOptions(rows=4))
    assert sum(seen) == result.token_forwards == 10 * (16 + 24 - 1)
    ends = frozenset(range(0, 320, 3))
    early = generate_batch(model, prompts, FREE, 24, ends, BatchOptions(rows=10))
    assert early.token_forwards == sum(16 + len(c.tokens) - 1 for c in early.texts), (
        "rows that end leave the batch"
    )


def test_draws_follow_the_models_distribution(model: Transformer) -> None:
    prompt = np.array([7, 8, 9])
    settings = Sampling(temperature=1.7, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    drawn = [
        int(c.tokens[0])
        for c in generate_batch(
            model, [prompt] * 6000, settings, 1, NONE, BatchOptions(rows=512)
        ).texts
    ]
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.from_numpy(prompt)[None]))[0, -1]
    expected = 6000 * torch.softmax(logits / 1.7, dim=0).numpy()
    counts = np.bincount(drawn, minlength=320)
    common = expected > 8
    chi = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
    assert chi < 2 * common.sum() and common.sum() > 10
    assert (
        abs(counts[~common].sum() - expected[~common].sum())
        < 5 * np.sqrt(expected[~common].sum()) + 1
    )


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.02),
        Sampling(temperature=1.3, top_k=0, top_p=0.8, min_p=0.0),
        Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.1),
        Sampling(temperature=2.0, top_k=0, top_p=0.999, min_p=0.0),
        Sampling(temperature=1.0, top_k=900, top_p=1.0, min_p=0.0),
    ],
)
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_filters_are_the_samplers(settings: Sampling, scale: float) -> None:
    """Also where a nucleus holds more tokens than are looked at first."""
    logits = scale * torch.randn(6, 640, generator=torch.Generator().manual_seed(0))
    ids, probabilities = kept_tokens(logits, settings)
    sampler = Sampler(settings)
    for row in range(6):
        tokens, expected = sampler.distribution(logits[row].numpy())
        found = probabilities[row] > 0
        assert ids[row][found].tolist() == tokens.tolist()
        np.testing.assert_allclose(probabilities[row][found].numpy(), expected, rtol=1e-5)
    grid = np.linspace(0, 1, 41)[:-1]
    for row in range(6):
        tokens, expected = sampler.distribution(logits[row].numpy())
        chosen = choose(logits[row].expand(40, -1).contiguous(), settings, grid + 1e-4)
        places = np.searchsorted(expected.cumsum(), grid + 1e-4, side="right")
        assert chosen.tolist() == tokens[np.minimum(places, len(tokens) - 1)].tolist()


def test_most_likely_is_topk() -> None:
    logits = torch.randn(9, 64 * 20, generator=torch.Generator().manual_seed(1))
    logits[:, -30:] = -torch.inf
    for k in (1, 8, 19, 20, 300):
        values, ids = blocked_topk(logits, k)
        expected = logits.topk(k, dim=1)
        assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)


def test_top_ids_are_those_of_whole_passes(model: Transformer) -> None:
    prompts = make_prompts(5)
    for prompt, text in zip(
        prompts,
        generate_batch(model, prompts, FREE, 10, NONE, BatchOptions(rows=3, top=6)).texts,
        strict=True,
    ):
        ids = torch.from_numpy(np.concatenate([prompt, text.tokens]))[None]
        with torch.no_grad():
            logits = model.logits(model.hidden(ids))[0, len(prompt) - 1 : -1]
        assert text.top.tolist() == logits.topk(6, dim=1).indices.tolist()


def test_padded_rows_of_the_head_are_never_written(model: Transformer) -> None:
    hot = Sampling(temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    texts = generate_batch(
        model, make_prompts(8), hot, 40, NONE, BatchOptions(vocab_size=291)
    ).texts
    drawn = np.concatenate([c.tokens for c in texts])
    assert drawn.max() == 290 and len(np.unique(drawn)) > 150


def test_what_cannot_be_continued_is_refused(model: Transformer) -> None:
    for prompt in (np.arange(5, 134), np.array([], dtype=np.int64)):
        with pytest.raises(
            UsageError, match=f"prompt of {len(prompt)} tokens cannot be continued: .* 128 tokens"
        ):
            generate_batch(model, [np.array([5]), prompt], GREEDY, 4, NONE)
    with pytest.raises(UsageError, match="needs a seed"):
        generate_batch(model, [np.array([5])], Sampling(), 4, NONE)
    broken = Transformer(make_config())
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(XinslmError, match="not finite"):
        generate_batch(broken, [np.array([5])], GREEDY, 4, NONE)
    assert generate_batch(model, [], GREEDY, 4, NONE).texts == []


def test_room_is_made_for_what_can_be_written_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are asked for, the context ends a text; as many rows as the bytes
    allow.
    """
    model = Transformer(ModelConfig(40, 16, 32, 1, 2, 2, 8, max_position_embeddings=24)).eval()
    model.initialise(torch.Generator().manual_seed(0))
    made = []
    real = batch.KVCache.__init__

    def note(self, config, rows, length, *rest):
        made.append((rows, length))
        real(self, config, rows, length, *rest)

    monkeypatch.setattr(batch.KVCache, "__init__", note)
    prompts = [np.arange(5), np.arange(9)]
    texts = generate_batch(model, prompts, Sampling(temperature=0), 10_000, frozenset()).texts
    assert [len(text.tokens) for text in texts] == [20, 16] and made == [(2, 9 + 20)]
    monkeypatch.setattr(batch, "CACHE_BYTES", 29 * 2 * 2 * 8 * 4)
    made.clear()
    again = generate_batch(model, prompts, Sampling(temperature=0), 10_000, frozenset()).texts
    assert (
        all((a.tokens == b.tokens).all() for a, b in zip(texts, again, strict=True))
        and made[0][0] == 1
    )
    assert batch.rows_that_fit(model, 10**12) == 1


@pytest.mark.parametrize("settings", [Sampling(top_k=0, top_p=0.8, seed=0), Sampling(top_k=0)])
def test_ties_are_ordered_by_id(settings: Sampling) -> None:
    """Logits in bfloat16 tie often; the nucleus may cut through a tie."""
    logits = np.random.default_rng(2).integers(0, 4, (5, 640)).astype(np.float32)
    ids, probabilities = kept_tokens(torch.from_numpy(logits), settings)
    for row in range(len(logits)):
        theirs, expected = Sampler(settings).distribution(logits[row])
        count = len(theirs)
        assert ids[row, :count].tolist() == theirs.tolist()
        np.testing.assert_allclose(probabilities[row, :count], expected, rtol=1e-6)
