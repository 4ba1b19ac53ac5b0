"""Batched generation: the engine's own greedy text, draws that no neighbour changes, and what it
costs.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from small_models import FAMILIES, make_config, save_random_model
from xinslm.draw import choose, kept_tokens
from xinslm.errors import UsageError, XinslmError
from xinslm.inference.sampling import Sampler
from xinslm.inference.torch_engine import TorchEngine
from xinslm.model.config import ModelConfig
from xinslm.model.decode import RowDecoder, shared_beginning, token_bytes
from xinslm.model.files import load_model
from xinslm.model.packed import product
from xinslm.model.transformer import Transformer
from xinslm.sampling import UNFILTERED, Sampling
from xinslm.teachers import generate
from xinslm.teachers.generate import Completions, Limits, generate_batch, uniforms
from xinslm.teachers.huggingface_decoder import HuggingFaceDecoder
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


def write(
    model: Transformer,
    prompts: list[np.ndarray],
    sampling: Sampling,
    limits: Limits,
    first: int = 0,
    vocab_size: int | None = None,
) -> Completions:
    return generate_batch(
        lambda rows, length: RowDecoder(model, rows, length, vocab_size),
        prompts,
        range(first, first + len(prompts)),
        sampling,
        limits,
    )


def limits(new: int, ends: frozenset[int] = NONE, rows: int = 128, **more: int) -> Limits:
    return Limits(new, more.pop("context", 128), ends, rows, **more)


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
    result = write(load_model(tmp_path), prompts, GREEDY, limits(30, ends, 8, context=40))
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
    result = write(load_model(folder), prompts, GREEDY, limits(60, frozenset({1, 2})))
    assert [c.tokens.tolist() for c in result.texts] == [
        one_by_one(engine, p, 60, frozenset({1, 2})) for p in prompts
    ]


def test_a_text_depends_on_its_number_and_the_seed_alone(model: Transformer) -> None:
    prompts = make_prompts(12)
    ends = frozenset(range(60, 75))  # rows end all the time, so that places are shuffled
    whole = write(model, prompts, FREE, limits(25, ends, 12)).texts
    for rows in (1, 5):
        again = write(model, prompts, FREE, limits(25, ends, rows)).texts
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(whole, again, strict=True))
    last = write(model, prompts[7:], FREE, limits(25, ends), first=7).texts
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(whole[7:], last, strict=True))
    same = write(model, [prompts[0]] * 6, FREE, limits(25, ends)).texts
    assert len({tuple(c.tokens.tolist()) for c in same}) == 6, (
        "the same prompt, another number: another text"
    )
    other = write(model, prompts, Sampling(**{**vars(FREE), "seed": 4}), limits(25, ends)).texts
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(whole, other, strict=True))


def test_every_token_goes_through_the_model_once(model: Transformer) -> None:
    """Without a cache, 16 + 24 tokens would cost 16 + 17 + ... = 660 forwards of a token a
    sequence.
    """
    seen: list[int] = []
    handle = model.model.layers[0].input_layernorm.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[:2].numel())
    )
    prompts = make_prompts(10, low=16, high=17)
    result = write(model, prompts, GREEDY, limits(24, rows=4))
    handle.remove()
    assert sum(seen) == result.token_forwards == 10 * (16 + 24 - 1)
    ends = frozenset(range(0, 320, 3))
    early = write(model, prompts, FREE, limits(24, ends, 4))
    assert early.token_forwards == sum(16 + len(c.tokens) - 1 for c in early.texts), (
        "rows that end leave the batch, or are given to another prompt"
    )


@pytest.mark.parametrize("window", [None, 6])
def test_a_beginning_that_all_share_is_read_once(tmp_path: Path, window: int | None) -> None:
    """The same texts as those of prompts that are read one by one, with fewer tokens."""
    save_random_model(tmp_path, **({"sliding_window": window} if window else {}))
    model = load_model(tmp_path)
    beginning = np.arange(30, 50)
    prompts = [np.concatenate((beginning, rest)) for rest in make_prompts(6, 1, 9)]
    together = write(model, prompts, GREEDY, limits(12))
    alone = [write(model, [prompt], GREEDY, limits(12)) for prompt in prompts]
    for text, one in zip(together.texts, alone, strict=True):
        assert text.tokens.tolist() == one.texts[0].tokens.tolist()
    assert together.token_forwards <= sum(one.token_forwards for one in alone) - 4 * 20
    assert shared_beginning(prompts) == 20 and shared_beginning(prompts[:1]) == 0
    assert shared_beginning([beginning, beginning]) == 19  # the last token gives the logits
    assert shared_beginning([beginning[:6], beginning]) == 0


def test_draws_follow_the_models_distribution(model: Transformer) -> None:
    prompt = np.array([7, 8, 9])
    settings = Sampling(temperature=1.7, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    drawn = [
        int(c.tokens[0]) for c in write(model, [prompt] * 6000, settings, limits(1, rows=512)).texts
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
    k = settings.top_k or 640
    ids, probabilities, _ = kept_tokens(logits, settings, logits.logsumexp(1, True).double(), k)
    sampler = Sampler(settings)
    for row in range(6):
        tokens, expected = sampler.distribution(logits[row].numpy())
        found = probabilities[row] > 0
        assert ids[row][found].tolist() == tokens.tolist()
        np.testing.assert_allclose(probabilities[row][found].numpy(), expected, rtol=1e-5)
    grid = np.linspace(0, 1, 41)[:-1]
    for row in range(6):
        tokens, expected = sampler.distribution(logits[row].numpy())
        chosen, log_probs = choose(logits[row].expand(40, -1).contiguous(), settings, grid + 1e-4)
        np.testing.assert_allclose(
            log_probs, logits[row].double().log_softmax(0)[chosen], rtol=1e-5
        )
        places = np.searchsorted(expected.cumsum(), grid + 1e-4, side="right")
        assert chosen.tolist() == tokens[np.minimum(places, len(tokens) - 1)].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_repetition_penalty_is_transformers(folder: Path, penalty: float) -> None:
    """Greedy texts of prompts of several lengths, rows refilled, are those of `generate`."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None
    prompts = make_prompts(7)
    settings = Sampling(temperature=0, repetition_penalty=penalty)
    found = write(load_model(folder), prompts, settings, limits(30, rows=3)).texts
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt)[None]
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=30,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert text.tokens.tolist() == expected[0, len(prompt) :].tolist()


def test_log_probabilities_are_the_models_own_under_a_penalty() -> None:
    logits = torch.randn(4, 64)
    seen = np.arange(12).reshape(4, 3)
    ids, found = choose(logits, Sampling(repetition_penalty=2.0, seed=0), np.full(4, 0.5), seen)
    expected = logits.log_softmax(1).gather(1, torch.from_numpy(ids)[:, None])[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_draws_follow_the_distribution_and_the_key() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0]).repeat(40_000, 1)
    keys, numbers = np.arange(40_000), np.zeros(40_000, int)
    tokens, log_probs = choose(logits, UNFILTERED, uniforms(keys, numbers, 0))
    share = np.bincount(tokens, minlength=5) / 40_000
    assert np.abs(share - logits[0].softmax(0).numpy()).max() < 0.01
    own = logits[0].double().log_softmax(0).numpy()
    np.testing.assert_allclose(log_probs, own[tokens], rtol=1e-6)
    # .64 .24 .09: the second reaches 0.85, and only then the temperature applies
    hot = Sampling(temperature=2.0, top_k=0, top_p=0.85, min_p=0.0)
    tokens, log_probs = choose(logits, hot, uniforms(keys, numbers, 0))
    share, softened = np.bincount(tokens, minlength=5) / 40_000, (logits[0, :2] / 2).softmax(0)
    assert np.abs(share[:2] - softened.numpy()).max() < 0.01 and not share[2:].any()
    np.testing.assert_allclose(log_probs, own[tokens], rtol=1e-6)
    for other in (uniforms(keys, numbers, 4), uniforms(keys, numbers + 1, 0)):
        assert (choose(logits, UNFILTERED, other)[0] != tokens).any()
        assert abs(np.corrcoef(other, uniforms(keys, numbers, 0))[0, 1]) < 0.02
    assert set(choose(logits, GREEDY, uniforms(keys, numbers, 0))[0]) == {0}


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
        write(model, prompts, FREE, limits(10, rows=3, top=6)).texts,
        strict=True,
    ):
        ids = torch.from_numpy(np.concatenate([prompt, text.tokens]))[None]
        with torch.no_grad():
            logits = model.logits(model.hidden(ids))[0, len(prompt) - 1 : -1]
        assert text.top.tolist() == logits.topk(6, dim=1).indices.tolist()


def test_padded_rows_of_the_head_are_never_written(model: Transformer) -> None:
    hot = Sampling(temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    texts = write(model, make_prompts(8), hot, limits(40), vocab_size=291).texts
    drawn = np.concatenate([c.tokens for c in texts])
    assert drawn.max() == 290 and len(np.unique(drawn)) > 150


def test_what_cannot_be_continued_is_refused(model: Transformer) -> None:
    for prompt in (np.arange(5, 134), np.array([], dtype=np.int64)):
        with pytest.raises(
            UsageError, match=f"prompt has {len(prompt)} tokens, the context of the model is 128"
        ):
            write(model, [np.array([5]), prompt], GREEDY, limits(4))
    with pytest.raises(UsageError, match="needs a seed"):
        write(model, [np.array([5])], Sampling(), limits(4))
    broken = Transformer(make_config())
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(XinslmError, match="not finite"):
        write(broken, [np.array([5])], GREEDY, limits(4))
    assert write(model, [], GREEDY, limits(4)).texts == []


def test_room_is_made_for_what_can_be_written_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are asked for, the context ends a text; as many rows as the bytes
    allow.
    """
    model = Transformer(ModelConfig(40, 16, 32, 1, 2, 2, 8, max_position_embeddings=24)).eval()
    model.initialise(torch.Generator().manual_seed(0))
    made = []
    real = RowDecoder.__init__

    def note(self, model, rows, length, *rest):
        made.append((rows, length))
        real(self, model, rows, length, *rest)

    monkeypatch.setattr(RowDecoder, "__init__", note)
    prompts = [np.arange(5), np.arange(9)]
    most = Limits(10_000, 24, NONE, None, token_bytes(model))
    texts = write(model, prompts, GREEDY, most).texts
    assert [len(text.tokens) for text in texts] == [20, 16] and made == [(2, 24)]
    monkeypatch.setattr(generate, "CACHE_BYTES", 29 * 2 * 2 * 8 * 4)
    made.clear()
    again = write(model, prompts, GREEDY, most).texts
    assert made[0][0] == 1
    assert all((a.tokens == b.tokens).all() for a, b in zip(texts, again, strict=True))
    assert generate.rows_that_fit(token_bytes(model), 10**12) == 1


@pytest.mark.parametrize("drops", [True, False], ids=["rows leave", "unknown cache"])
def test_both_decoders_write_the_same_texts(
    folder: Path, model: Transformer, drops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' model and ours, with prompts of different lengths and rows that end."""
    if not drops:
        monkeypatch.setattr(transformers.cache_utils, "DynamicLayer", int)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    made = []

    def open_decoder(rows: int, length: int) -> HuggingFaceDecoder:
        made.append(HuggingFaceDecoder(theirs, 320, "t"))
        return made[0]

    prompts, ends = make_prompts(19), frozenset(range(60, 90))
    most = limits(25, ends, 8)
    expected = write(model, prompts, FREE, most)
    found = generate_batch(open_decoder, prompts, range(19), FREE, most)
    for ours, other in zip(expected.texts, found.texts, strict=True):
        assert ours.tokens.tolist() == other.tokens.tolist() and ours.ended == other.ended
        np.testing.assert_allclose(ours.log_probs, other.log_probs, atol=1e-4)
    needed = sum(len(p) + len(t.tokens) - 1 for p, t in zip(prompts, found.texts, strict=True))
    if drops:
        assert needed <= made[0].token_forwards <= 1.1 * needed
    else:
        assert made[0].token_forwards > 1.2 * needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_multiply_alike(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 96, generator=generator).to(dtype) for n in (64, 32)]
    whole = torch.cat(weights).double()
    for rows in (8, 16, 3):
        x = torch.randn(rows, 96, generator=generator).to(dtype)
        expected = x.double() @ whole.T
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        for pack in (True, False):
            found = product(weights, 16, pack)(x)
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0.01)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}, *FAMILIES.values()], ids=str)
def test_rows_of_any_length_have_the_models_logits(changes: dict) -> None:
    """Rows are read again while others are in the middle of their text, and move."""
    model = Transformer(make_config(**changes)).eval()
    model.initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(-1.5, 1.5, generator=torch.Generator().manual_seed(2))
    rng, decoder = np.random.default_rng(0), RowDecoder(model, 4, 40)
    rows = [rng.integers(5, 320, n) for n in (3, 9, 14, 5)]

    def check(logits: torch.Tensor, texts: list[np.ndarray]) -> None:
        for row, ids in zip(logits, texts, strict=True):
            with torch.no_grad():
                whole = model.logits(model.hidden(torch.from_numpy(ids)[None]))[0, -1]
            torch.testing.assert_close(row, whole, atol=2e-5, rtol=1e-4)

    check(decoder.read(range(4), rows)[0], rows)
    for turn in range(6):
        if turn == 2:
            rows[1] = rng.integers(5, 320, 4)
            check(decoder.read([1], rows[1:2])[0], rows[1:2])
        if turn == 4:
            decoder.keep(np.array([3, 1, 2]))
            rows = [rows[3], rows[1], rows[2]]
        tokens = rng.integers(5, 320, len(rows))
        rows = [np.append(ids, token) for ids, token in zip(rows, tokens, strict=True)]
        check(decoder.step(torch.from_numpy(tokens)), rows)


@pytest.mark.parametrize("settings", [Sampling(top_k=0, top_p=0.8, seed=0), Sampling(top_k=0)])
def test_ties_are_ordered_by_id(settings: Sampling) -> None:
    """Logits in bfloat16 tie often; the nucleus may cut through a tie."""
    logits = np.random.default_rng(2).integers(0, 4, (5, 640)).astype(np.float32)
    rows = torch.from_numpy(logits)
    ids, probabilities, is_whole = kept_tokens(
        rows, settings, rows.logsumexp(1, True).double(), settings.top_k or 640
    )
    for row in range(len(logits)):
        theirs, expected = Sampler(settings).distribution(logits[row])
        count = len(theirs)
        assert ids[row, :count].tolist() == theirs.tolist()
        np.testing.assert_allclose(probabilities[row, :count], expected, rtol=1e-6)
    assert bool(is_whole.all())
    few = kept_tokens(rows, settings, rows.logsumexp(1, True).double(), 8)[2]
    assert not settings.top_p < 1 or not bool(few.any()), "more than 8 tokens tie for the nucleus"
