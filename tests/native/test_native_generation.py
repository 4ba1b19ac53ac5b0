"""Sampling in the library, and speculative decoding: the same tokens, sooner."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from small_models import save_quantized, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.config import EvaluateConfig
from xinslm.evaluate.native_scorer import NativeScorer
from xinslm.evaluate.run import run as run_evaluate
from xinslm.inference.config import EngineConfig, GenerateConfig, NativeConfig
from xinslm.inference.generate import generate
from xinslm.inference.generate import run as run_generate
from xinslm.inference.load import load_engine
from xinslm.inference.native_engine import NativeEngine
from xinslm.inference.native_info import run as native_info
from xinslm.inference.raw_weights import open_raw
from xinslm.inference.sampling import Sampler, log_probability
from xinslm.inference.speculative import LookupDrafter, ModelDrafter, Speculative
from xinslm.native.sampling import draw
from xinslm.sampling import Sampling


@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3, 0.8, 2.0]),
    st.sampled_from([0, 1, 7, 40, 1000]),
    st.sampled_from([0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    st.sampled_from([0.7, 1.0, 1.3]),
)
@settings(max_examples=200, deadline=None)
def test_draws_are_the_samplers(seed, temperature, top_k, top_p, min_p, penalty) -> None:
    rng = np.random.default_rng(seed)
    # rounded, so that many logits tie
    logits = (rng.normal(0, 3, 200).round(1) if seed % 2 else rng.normal(0, 3, 200)).astype("f4")
    chosen = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        seed=seed,
    )
    seen = rng.integers(0, 200, 30).tolist()
    twin, numbers = Sampler(chosen), np.random.default_rng(seed)
    for _ in range(5):
        token = twin.draw(logits, seen)
        uniform = numbers.random() if temperature else 0.0
        got, likelihood = draw(logits, chosen, seen, uniform)
        if got != token:  # the sums end within rounding of the number that was drawn
            tokens, shares = twin.distribution(logits, seen)
            edges = shares.cumsum()
            assert np.abs(edges - uniform).min() < 1e-6 and got in tokens
        assert likelihood == pytest.approx(log_probability(logits, got), abs=1e-9)


def test_nan_and_infinity_are_errors() -> None:
    for odd in (np.nan, np.inf):
        logits = np.zeros(10, np.float32)
        logits[3] = odd
        with pytest.raises(XinslmError, match="the model's logits are NaN or infinite"):
            draw(logits, Sampling(seed=0), [], 0.5)
    with pytest.raises(XinslmError, match="all logits are -infinity"):
        draw(np.full(10, -np.inf, np.float32), Sampling(seed=0), [], 0.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    save_quantized(folder, "tied")
    save_random_model(folder / "small", seed=1, num_hidden_layers=1)
    return folder


def tokens_of(engine, prompt: list[int], **changes: object) -> list[int]:
    chosen = Sampling(**({"temperature": 0.7, "seed": 3} | changes))
    return [p.token for p in generate(engine, prompt, chosen, 100, frozenset())]


PROMPT = [5, 9, 17, 5, 9, 17, 5, 9]


@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("drafter", ["lookup", "small", "q"])
def test_the_text_is_that_of_the_engine_alone(models, temperature, drafter) -> None:
    wanted = tokens_of(NativeEngine.load(models / "q"), PROMPT, temperature=temperature)
    draft = drafter if drafter == "lookup" else str(models / drafter)
    engine = load_engine(EngineConfig(model=models / "q", draft=draft))
    assert isinstance(engine, Speculative)
    assert tokens_of(engine, PROMPT, temperature=temperature) == wanted
    assert engine.position == len(PROMPT) + len(wanted) - 1
    assert tokens_of(engine, PROMPT[:5], temperature=temperature) == tokens_of(
        NativeEngine.load(models / "q"), PROMPT[:5], temperature=temperature
    )
    if drafter == "q" and temperature == 0:
        assert engine.accepted > 0.9 * engine.guessed > 50  # a model guesses itself right


def test_a_window_and_a_full_context_do_not_disturb_it(tmp_path: Path) -> None:
    save_random_model(tmp_path, sliding_window=6, max_position_embeddings=90)
    wanted = tokens_of(NativeEngine.load(tmp_path), PROMPT, temperature=0)
    assert len(wanted) == 90 - len(PROMPT) + 1
    for drafter in (LookupDrafter(), ModelDrafter(NativeEngine.load(tmp_path))):
        engine = Speculative(NativeEngine.load(tmp_path), drafter)
        assert tokens_of(engine, PROMPT, temperature=0) == wanted


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_verify_has_the_bits_of_steps_also_after_a_rewind(models, cache) -> None:
    ids = np.random.default_rng(6).integers(0, 320, 60).tolist()
    steps, checked = (NativeEngine.load(models / "q", threads=2, cache=cache) for _ in range(2))
    steps.start(ids[:20])
    wanted = np.stack([steps.step(token) for token in ids[20:]])
    checked.start(ids[:20])
    assert np.array_equal(checked.verify([*ids[20:32], 3, 4])[:12], wanted[:12])
    checked.rewind(32)
    assert checked.position == 32
    assert np.array_equal(checked.verify(ids[32:]), wanted[12:])


def test_lookup_proposes_what_followed() -> None:
    drafter = LookupDrafter()
    assert drafter.propose([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert drafter.propose([1, 2, 3, 4, 1, 2, 3], 2) == [4, 1]
    assert drafter.propose([1, 2, 3, 4, 1, 2, 3, 9], 2) == []
    assert drafter.propose([7, 8, 9, 7, 8], 2) == [9, 7]  # another text
    assert drafter.propose([1], 2) == []


def test_drafts_need_the_same_tokenizer(models, tmp_path) -> None:
    save_random_model(tmp_path, vocab_size=300, vocabulary=300)
    with pytest.raises(UsageError, match=f"--draft {tmp_path}: its tokenizer is not that of"):
        load_engine(EngineConfig(model=models / "q", draft=str(tmp_path)))
    with pytest.raises(UsageError, match="--draft lookup needs the native engine"):
        load_engine(EngineConfig(model=models / "q", engine="pytorch", draft="lookup"))


def test_rows_that_pad_the_vocabulary_are_never_written(tmp_path) -> None:
    """The padding would win every time."""
    save_random_model(tmp_path, vocab_size=384, vocabulary=320)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][320:] *= 1000
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = NativeEngine.load(tmp_path)
    assert engine.start(PROMPT).shape == (320,)
    assert engine.verify([5, 6, 7]).shape == (3, 320)
    engine.reset()
    assert max(tokens_of(engine, PROMPT, temperature=1.0)) < 320


def test_a_draft_that_is_nothing_is_named(models) -> None:
    with pytest.raises(UsageError, match="--draft lokup is neither lookup nor none, nor a model"):
        load_engine(EngineConfig(model=models / "q", draft="lokup"))


def test_settings_beyond_float32_are_refused_by_their_names(models) -> None:
    engine = NativeEngine.load(models / "q")
    for name, value in (("temperature", 1e40), ("repetition_penalty", 1e40)):
        with pytest.raises(UsageError, match=f"{name} is 1e.40, but must be at most"):
            tokens_of(engine, PROMPT, **{name: value})
    with pytest.raises(UsageError, match="repetition_penalty is 1e-46, but must be at least"):
        tokens_of(engine, PROMPT, repetition_penalty=1e-46)
    limits = [("temperature", 1e-46), ("temperature", 1e6)]
    limits += [("repetition_penalty", 0.01), ("repetition_penalty", 100)]
    for name, value in limits:
        assert len(tokens_of(engine, PROMPT, **{name: value})) == 100


def test_generate_gives_the_same_text_with_every_draft(models) -> None:
    texts = {
        run_generate(
            GenerateConfig(
                model=models / "q", prompt="The fox", max_new_tokens=40, seed=1, draft=draft
            )
        ).text
        for draft in ("none", "auto", "lookup", str(models / "small"))
    }
    assert len(texts) == 1


def test_native_info_says_what_runs(models, monkeypatch) -> None:
    found = native_info(NativeConfig(model=models / "q"))
    assert found.kernels[-1] == "scalar" and f"{models / 'q'}: native engine" in found.describe()
    monkeypatch.setenv("XINSLM_NATIVE", "off")
    off = native_info(NativeConfig(model=models / "q")).describe()
    assert "none (XINSLM_NATIVE=off)" in off and "PyTorch engine (XINSLM_NATIVE=off)" in off


def test_evaluate_with_int8_activations_takes_it(models, tmp_path, monkeypatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox.\n\nIt's 12345 o'clock, and we've 3.14 reasons!\n" * 9)
    config = EvaluateConfig(models / "q", (str(text),), activations="int8", device="cpu")
    ours = run_evaluate(config)
    assert ours.activations == "int8 in 15 of 15 linear layers, native engine"
    monkeypatch.setenv("XINSLM_NATIVE", "off")
    twin = run_evaluate(config)
    assert twin.activations == "int8 in 15 of 15 linear layers"
    assert ours.tokens == twin.tokens and ours.parameters == twin.parameters
    assert ours.bits_per_byte == pytest.approx(twin.bits_per_byte, rel=3e-3)
    plain = run_evaluate(EvaluateConfig(models / "q", (str(text),), device="cpu"))
    assert plain.bits_per_byte != twin.bits_per_byte


def test_the_scorer_reads_long_texts_in_parts_so_that_ctrl_c_takes_effect(tmp_path) -> None:
    save_random_model(tmp_path, max_position_embeddings=1024)
    raw = open_raw(tmp_path)
    assert raw is not None
    scorer, sizes = NativeScorer(tmp_path, raw, ""), []
    texts = [np.random.default_rng(7).integers(0, 320, length) for length in (700, 256, 1)]
    wanted = []
    for text in texts:
        sequence = scorer.context.add()
        owners = [sequence] * len(text)
        wanted.append(scorer.context.extend_states(text.tolist(), owners, range(len(text))))
        scorer.context.remove(sequence)
    extend = scorer.context.extend_states

    def watched(tokens, *rest):
        sizes.append(len(tokens))
        return extend(tokens, *rest)

    scorer.context.extend_states = watched
    assert np.array_equal(scorer.states(texts).numpy(), np.concatenate(wanted))
    assert sum(sizes) == 957 and max(sizes) == 256
    with pytest.raises(XinslmError, match="token 320"):
        scorer.states([np.array([1, 320])])
    assert scorer.context.cache_bytes() == 0
