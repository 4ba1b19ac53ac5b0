"""Trees in the native library: every value is that of the pair alone, to the last bit."""

import numpy as np
import pytest
import torch
from test_likelihood import SHAPES, VOCABULARY, make_pairs

from small_models import save_random_model
from xinslm.evaluate import trie
from xinslm.evaluate.likelihood import LikelihoodScorer, Pair
from xinslm.evaluate.native_scorer import NativeScorer
from xinslm.evaluate.scorers import load_scorer
from xinslm.native import library
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.sampling import Sampling
from xinslm.teachers.generate import Limits, generate_batch

pytestmark = pytest.mark.skipif(library() is None, reason="no native library")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=SHAPES)
def scorer(request, tmp_path_factory) -> NativeScorer:
    path = tmp_path_factory.mktemp("model")
    save_random_model(path / "full", **SHAPES[request.param], max_position_embeddings=96)
    quantize(QuantizeConfig(path / "full", path / "q4", method="rtn"))
    found, facts = load_scorer(path / "q4", CPU, activations="int8")
    assert isinstance(found, NativeScorer) and "native engine" in facts["activations"]
    return found


def alone(scorer: NativeScorer, pair: Pair) -> tuple[float, bool]:
    """The pair in a sequence of its own, plain log-softmax."""
    ids = np.concatenate([pair.context, pair.continuation])[-(scorer.max_length + 1) :]
    states = scorer.states([ids[:-1]])[-len(pair.continuation) :]
    logits = scorer.outputs(states)
    target = torch.from_numpy(np.asarray(pair.continuation, np.int64))
    values = logits.double().log_softmax(-1).gather(1, target[:, None])
    return values.sum().item(), bool((logits.argmax(1) == target).all())


@pytest.mark.parametrize("row_tokens", [8, 64, 512])
@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_each_value_is_that_of_the_pair_alone(scorer, monkeypatch, row_tokens, batch_tokens):
    monkeypatch.setattr(trie, "ROW_TOKENS", row_tokens)
    pairs = make_pairs(row_tokens)
    tree = LikelihoodScorer(scorer, batch_tokens)
    values, greedy = tree(pairs)
    for pair, value, is_greedy in zip(pairs, values, greedy, strict=True):
        expected, flag = alone(scorer, pair)
        assert value == pytest.approx(expected, abs=2e-5)  # float32 log-softmax of equal logits
        assert is_greedy == flag
    assert tree.counts.computed_tokens < 0.6 * tree.counts.requested_tokens


def test_states_are_those_of_each_text_alone_to_the_last_bit(scorer):
    pairs = make_pairs(1)
    texts = sorted({tuple(pair.context.tolist()[:90]) for pair in pairs})
    arrays = [np.array(text) for text in texts]
    needed = np.array([len(text) for text in texts])
    first = np.concatenate([[0], np.cumsum(needed)[:-1]])
    found: dict[int, torch.Tensor] = {}
    held = []
    for group in trie.plan(arrays, needed, first):
        if group.prefix is not None:
            del held[group.level - 1 :]
            states, prefix = scorer.read_prefix(group.prefix, held[-1] if held else None)
            held.append(prefix)
            places = zip(group.prefix.slots, group.prefix.places, strict=True)
            found |= {int(slot): states[place] for slot, place in places}
        if group.rows:
            states = scorer.read_rows(group.rows, held[-1] if group.level else None)
            for number, row in enumerate(group.rows):
                places = zip(row.slots, row.places, strict=True)
                found |= {int(slot): states[number, place] for slot, place in places}
    for text, slot in zip(arrays, first, strict=True):
        expected = scorer.states([text])
        for position in range(len(text)):
            assert torch.equal(found[int(slot) + position], expected[position])


def test_sequences_are_given_back(scorer):
    tree = LikelihoodScorer(scorer, 64)
    pairs = make_pairs(2)
    tree(pairs)
    held = scorer.context.cache_bytes()
    tree(pairs)
    assert scorer.context.cache_bytes() == held == 0


def greedy(scorer: NativeScorer, prompt: np.ndarray, limits: Limits) -> list[int]:
    ids, written = list(prompt), []
    most = min(limits.max_new_tokens, limits.context - len(prompt) + 1)
    while len(written) < most and not (written and written[-1] in limits.end_ids):
        logits = scorer.logits(scorer.states([np.array(ids)])[-1:])
        written.append(int(logits.argmax()))
        ids.append(written[-1])
    return written


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_batch_writes_what_each_prompt_gives_alone(scorer, rows):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, size) for size in (3, 17, 1, 8, 30, 5)]
    limits = Limits(12, scorer.max_length, frozenset({5, 9}), rows)
    open_decoder = scorer.open_decoder
    found = generate_batch(open_decoder, prompts, range(6), Sampling(temperature=0.0), limits)
    for prompt, text in zip(prompts, found.texts, strict=True):
        assert text.tokens.tolist() == greedy(scorer, prompt, limits)
    del open_decoder
    assert scorer.context.cache_bytes() == 0


def test_rows_that_have_ended_may_be_full(scorer):
    rng = np.random.default_rng(1)
    sizes = (96, 95, 3, 5, 4, 6, 7, 2, 90)
    prompts = [rng.integers(0, VOCABULARY, size) for size in sizes]
    limits = Limits(90, scorer.max_length, frozenset({5}), 9)
    found = generate_batch(
        scorer.open_decoder, prompts, range(9), Sampling(temperature=0.0), limits
    )
    for prompt, text in zip(prompts, found.texts, strict=True):
        assert text.tokens.tolist() == greedy(scorer, prompt, limits)


def test_what_all_prompts_begin_with_is_read_once(scorer):
    rng = np.random.default_rng(2)
    header = rng.integers(0, VOCABULARY, 60)
    prompts = [np.concatenate([header, rng.integers(0, VOCABULARY, 4)]) for _ in range(6)]
    prompts.append(header)
    limits = Limits(1, scorer.max_length, frozenset(), 8)
    found = generate_batch(
        scorer.open_decoder, prompts, range(7), Sampling(temperature=0.0), limits
    )
    for prompt, text in zip(prompts, found.texts, strict=True):
        assert text.tokens.tolist() == greedy(scorer, prompt, limits)
    assert found.token_forwards == 59 + 6 * 5 + 1
