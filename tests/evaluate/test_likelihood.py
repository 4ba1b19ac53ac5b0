"""The tree scorer against transformers on each pair alone, in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from small_models import FAMILIES, save_random_model
from xinslm.evaluate import likelihood, trie
from xinslm.evaluate.likelihood import LikelihoodScorer, Pair
from xinslm.model.files import open_model
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.own import OwnTeacher

VOCABULARY = 320


SHAPES = {"full": {}, "window": {"sliding_window": 9}}
SHAPES |= {name: FAMILIES[name] for name in ("qwen2", "qwen3")}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, **SHAPES[request.param], max_position_embeddings=96)
    return path


def load(folder, kind=OwnTeacher):
    return kind(open_model(folder), "float64")


def make_pairs(seed: int) -> list[Pair]:
    """Nested contexts, contexts that begin alike, one-token choices, a pair that is cut."""
    rng = np.random.default_rng(seed)
    header = rng.integers(0, VOCABULARY, 40)
    pairs = []
    for length in (0, 20, 40):
        for _ in range(4):
            context = np.concatenate([header[:length], rng.integers(0, VOCABULARY, 5)])
            for size in (1, 1, 2, 6):
                pairs.append(Pair(context, rng.integers(0, VOCABULARY, size)))
            pairs.append(Pair(context[:3], context[3:]))
            pairs.append(Pair(context, np.concatenate([context[:2], context[:1]])))
    pairs.append(Pair(rng.integers(0, VOCABULARY, 120), rng.integers(0, VOCABULARY, 4)))
    order = rng.permutation(len(pairs))
    return [pairs[i] for i in order]


def alone(model, pair: Pair, limit: int) -> tuple[float, bool]:
    """What lm-evaluation-harness computes: the pair alone, cut on the left, plain log-softmax."""
    ids = torch.from_numpy(np.concatenate([pair.context, pair.continuation])[-(limit + 1) :])
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0, -len(pair.continuation) :]
    target = torch.from_numpy(np.asarray(pair.continuation))
    values = logits.log_softmax(-1).gather(1, target[:, None])
    return values.sum().item(), bool((logits.argmax(1) == target).all())


@pytest.mark.parametrize("row_tokens", [8, 64, 512])
@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_each_value_is_that_of_the_pair_alone(folder, monkeypatch, row_tokens, batch_tokens):
    monkeypatch.setattr(trie, "ROW_TOKENS", row_tokens)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    pairs = make_pairs(row_tokens)
    scorer = LikelihoodScorer(load(folder), batch_tokens)
    values, greedy = scorer(pairs)
    for pair, value, is_greedy in zip(pairs, values, greedy, strict=True):
        expected, flag = alone(reference, pair, 96)
        assert value == pytest.approx(expected, abs=1e-9)
        assert is_greedy == flag
    assert [len(pairs[number].context) for number in scorer.truncated] == [120]
    assert scorer.counts.computed_tokens < 0.6 * scorer.counts.requested_tokens
    assert scorer.cost(pairs) == scorer.counts.computed_tokens


def test_other_architectures_take_the_plain_path(folder):
    pairs = make_pairs(3)
    own, _ = LikelihoodScorer(load(folder))(pairs)
    other = LikelihoodScorer(load(folder, HuggingFaceTeacher))
    assert not other.shares
    assert other(pairs)[0] == pytest.approx(own, abs=1e-9)


def test_the_greedy_continuation_is_recognised(folder):
    teacher = load(folder)
    ids = list(np.arange(7))
    for _ in range(5):
        logits = teacher.outputs(teacher.states([np.array(ids)])[-1:])
        ids.append(int(logits.argmax()))
    pairs = [Pair(np.array(ids[:7]), np.array(ids[7:])), Pair(np.array(ids[:7]), np.array([1]))]
    assert LikelihoodScorer(teacher)(pairs)[1].tolist() == [True, ids[7] == 1]


def test_a_changed_branch_leaves_the_others_alone(folder):
    pairs = make_pairs(4)
    scorer = LikelihoodScorer(load(folder))
    before, _ = scorer(pairs)
    context = pairs[0].context
    same = [n for n, pair in enumerate(pairs) if not np.array_equal(pair.context, context)]
    pairs[0] = Pair(context, (pairs[0].continuation + 1) % VOCABULARY)
    after, _ = scorer(pairs)
    assert after[same] == pytest.approx(before[same], abs=1e-12)
    assert after[0] != pytest.approx(before[0])


def test_results_follow_the_order_of_the_pairs(folder):
    pairs, scorer = make_pairs(5), LikelihoodScorer(load(folder))
    pairs += [Pair(pair.context.copy(), pair.continuation.copy()) for pair in pairs[:9]]
    values, flags = scorer(pairs)
    assert values[-9:].tolist() == values[:9].tolist()
    order = np.random.default_rng(0).permutation(len(pairs))
    again, flags_again = scorer([pairs[i] for i in order])
    assert again == pytest.approx(values[order], abs=1e-12)
    assert flags_again.tolist() == flags[order].tolist()


def test_logits_are_computed_in_blocks(folder, monkeypatch):
    # glibc returns a larger block when it is freed, and takes new memory for the next
    assert 4 * likelihood.CHUNK_LOGITS < 32 << 20
    scorer, pairs = LikelihoodScorer(load(folder), 4096), make_pairs(3)
    expected, _ = scorer(pairs)
    rows, outputs = [], scorer.model.outputs

    def recorded(states):
        rows.append(len(states))
        return outputs(states)

    monkeypatch.setattr(likelihood, "CHUNK_LOGITS", 7 * VOCABULARY + 1)
    monkeypatch.setattr(scorer.model, "outputs", recorded)
    values, _ = scorer(pairs)
    assert 5 <= max(rows) <= 7
    assert values == pytest.approx(expected, abs=1e-12)


def test_blocks_of_growing_size_share_one_memory(folder):
    teacher = load(folder)
    states = teacher.states([np.arange(20)])
    places = {teacher.outputs(states[:count]).data_ptr() for count in (1, 5, 20)}
    assert len(places) == 1


def test_log_probabilities_of_a_bfloat16_model_are_float32(folder, monkeypatch):
    teacher = OwnTeacher(open_model(folder), "bfloat16")
    original, seen = teacher.model.logits, []
    monkeypatch.setattr(teacher.model, "logits", lambda *x: seen.append(original(*x)) or seen[-1])
    pair = Pair(np.arange(20), np.arange(30, 70))
    values, _ = LikelihoodScorer(teacher)([pair])
    (logits,) = seen
    assert logits.dtype == torch.bfloat16
    target = torch.from_numpy(pair.continuation)[:, None]
    exact = logits.double().log_softmax(-1).gather(1, target).sum().item()
    rounded = logits.log_softmax(-1).gather(1, target).sum().item()
    assert values[0] == pytest.approx(exact, abs=1e-4)
    assert abs(rounded - exact) > 1e-3


def test_empty_parts_are_refused(folder):
    scorer = LikelihoodScorer(load(folder))
    some, none = np.array([1]), np.array([], np.int64)
    for pair in (Pair(some, none), Pair(none, some)):
        with pytest.raises(ValueError, match="at least one token"):
            scorer([pair])
    with pytest.raises(ValueError, match="does not fit the context of 96"):
        scorer([Pair(some, np.ones(97, np.int64))])


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(texts, st.sampled_from([1, 4, 9]), st.sampled_from([1, 3]))
def test_the_rows_hold_each_text_once(found, row_tokens, least_prefix):
    """Brute force: following the ancestors of each slot gives the text up to that token."""
    sequences = [np.array(t) for t in sorted({tuple(text) for text in found})]
    needed = np.array([len(text) for text in sequences])
    slots = np.concatenate([[0], np.cumsum(needed)[:-1]])
    old = trie.ROW_TOKENS, trie.LEAST_PREFIX
    trie.ROW_TOKENS, trie.LEAST_PREFIX = row_tokens, least_prefix
    try:
        groups = trie.plan(sequences, needed, slots)
    finally:
        trie.ROW_TOKENS, trie.LEAST_PREFIX = old
    seen, stack = {}, []
    for group in groups:
        if group.prefix is not None:
            del stack[group.level - 1 :]
            before = list(itertools.chain(*stack))
            collect(group.prefix, before, seen)
            stack.append(group.prefix.tokens.tolist())
        before = list(itertools.chain(*stack)) if group.level else []
        for row in group.rows:
            collect(row, before, seen)
    expected = {
        int(slots[n]) + end: text[: end + 1].tolist()
        for n, text in enumerate(sequences)
        for end in range(len(text))
    }
    assert seen == expected


def collect(row, before, seen) -> None:
    for place, slot in zip(row.places, row.slots, strict=True):
        ancestors = [j for j in range(place + 1) if place < row.ends[j]]
        assert row.positions[ancestors].tolist() == list(
            range(len(before), len(before) + len(ancestors))
        )
        assert int(slot) not in seen
        seen[int(slot)] = before + row.tokens[ancestors].tolist()
