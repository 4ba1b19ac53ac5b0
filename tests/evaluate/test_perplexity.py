"""Rolling log-likelihoods against lm-evaluation-harness (its windows, its values) and plain
transformers.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from small_models import save_random_model
from xinslm.errors import XinslmError
from xinslm.evaluate.documents import read_items
from xinslm.evaluate.perplexity import Item, rolling_windows, score
from xinslm.evaluate.scorers import load_scorer

CPU = torch.device("cpu")

# (tokens after the prefix, longest window): (input, predicted) of each window, printed from lm_eval
# 0.4.13's get_rolling_token_windows(tokens, 0, longest, context_len=1) and make_disjoint_window;
# token i is i, the prefix 0
HARNESS = {
    (3, 5): [([0, 1, 2], [1, 2, 3])],
    (5, 5): [([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])],
    (6, 5): [([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]), ([1, 2, 3, 4, 5], [6])],
    (11, 5): [
        ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]),
        ([5, 6, 7, 8, 9], [6, 7, 8, 9, 10]),
        ([6, 7, 8, 9, 10], [11]),
    ],
    (12, 4): [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([8, 9, 10, 11], [9, 10, 11, 12]),
    ],
    (4, 1): [([0], [1]), ([1], [2]), ([2], [3]), ([3], [4])],
}


@pytest.mark.parametrize(("count", "longest"), HARNESS)
def test_windows_are_the_harness_windows(count: int, longest: int) -> None:
    found = [
        (list(range(w.begin, w.end)), list(range(w.end - w.predicted + 1, w.end + 1)))
        for w in rolling_windows(count + 1, longest)
    ]
    assert found == HARNESS[count, longest]


@given(st.integers(0, 300), st.integers(1, 40))
def test_each_token_is_predicted_once_with_a_window_as_full_as_can_be(
    count: int, longest: int
) -> None:
    predicted: list[int] = []
    for window in rolling_windows(count + 1, longest):
        predicted += range(window.end - window.predicted + 1, window.end + 1)
        assert window.end - window.begin == min(longest, window.end)
    assert predicted == list(range(1, count + 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, max_position_embeddings=32)
    return folder


def random_items() -> list[Item]:
    rng = np.random.default_rng(0)
    items = []
    for index, length in enumerate([1, 2, 20, 33, 34, 70, 97, 5]):
        tokens = rng.integers(0, 320, length + 1)
        scored = rng.random(length + 1) < 0.7
        scored[0], scored[-1] = False, True
        items.append(Item(f"document {index}", tokens, scored, 1))
    return items


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_equal_to_transformers_window_by_window(folder: Path, batch_tokens: int) -> None:
    scorer, _ = load_scorer(folder, CPU)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    items = random_items()
    done: list[int] = []
    for item, found in zip(items, score(scorer, items, batch_tokens, done.append), strict=True):
        expected = 0.0
        for w in rolling_windows(len(item.tokens), 32):
            ids = torch.from_numpy(item.tokens[w.begin : w.end])[None]
            with torch.no_grad():
                log_probabilities = reference(ids).logits[0].double().log_softmax(-1)
            for place in range(w.end - w.predicted + 1, w.end + 1):
                if item.scored[place]:
                    expected += log_probabilities[place - 1 - w.begin, item.tokens[place]].item()
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert found.tokens == item.scored.sum()
    assert sum(done) >= sum(len(item.tokens) - 1 for item in items)


def test_logits_are_never_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xinslm.evaluate import perplexity

    scorer, _ = load_scorer(folder, CPU)
    expected = score(scorer, random_items())
    rows: list[int] = []
    original = scorer.logits
    monkeypatch.setattr(
        scorer, "logits", lambda states: rows.append(len(states)) or original(states)
    )
    monkeypatch.setattr(perplexity, "CHUNK_LOGITS", 7 * 320)
    again = score(scorer, random_items())
    assert max(rows) == 7
    assert sum(rows) == sum(item.scored.sum() for item in random_items()), (
        "only scored places need the head"
    )
    np.testing.assert_allclose(
        [s.log_likelihood for s in again], [s.log_likelihood for s in expected], rtol=1e-6
    )


def test_damaged_weights_name_the_document(folder: Path) -> None:
    scorer, _ = load_scorer(folder, CPU)
    items = random_items()
    with torch.no_grad():
        scorer.model.model.embed_tokens.weight[items[2].tokens[0]] = float("nan")
    with pytest.raises(XinslmError, match=r"document \d: its log-likelihood is nan"):
        score(scorer, items)


def test_log_probabilities_of_a_bfloat16_model_are_float32(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, _ = load_scorer(folder, CPU, "bfloat16")
    seen: list[torch.Tensor] = []
    original = scorer.model.logits
    monkeypatch.setattr(
        scorer.model, "logits", lambda states: seen.append(original(states)) or seen[-1]
    )
    tokens = np.arange(31)
    item = Item("x", tokens, tokens > 0, 1)
    (found,) = score(scorer, [item])
    (logits,) = seen
    assert logits.dtype == torch.bfloat16
    target = torch.from_numpy(tokens[1:, None])
    exact = logits.double().log_softmax(-1).gather(1, target).sum().item()
    rounded = logits.log_softmax(-1).gather(1, target).sum().item()
    assert found.log_likelihood == pytest.approx(exact, abs=1e-4)
    assert abs(rounded - exact) > 1e-2


def test_padding_of_the_vocabulary_has_no_probability(tmp_path: Path) -> None:
    model = save_random_model(tmp_path, vocab_size=400)  # the tokenizer has 320 ids
    scorer, _ = load_scorer(tmp_path, CPU)
    item = Item("x", np.array([0, 9]), np.array([False, True]), 1)
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor([[0]])))[0, 0, :320].double()
    assert score(scorer, [item])[0].log_likelihood == pytest.approx(
        logits.log_softmax(-1)[9].item(), rel=1e-5
    )


def test_golden_values_of_the_harness(shared_data: Path) -> None:
    """lm-eval 0.4.13 in float64 on stories260K, whose tokenizer it lets add BOS: BOS is predicted
    after BOS.
    """
    golden = json.loads(
        (shared_data / "bench" / "golden_lmeval_0.4.13_stories260K.json").read_text()
    )
    task = golden["tasks"]["stories_ppl_local"]
    scorer, _ = load_scorer(shared_data / "models" / "stories260K", CPU)
    data = (str(shared_data / "text" / "tinystories_docs.jsonl"),)
    items = read_items(data, "validation", scorer.tokenizer, 30)
    doubled = [
        Item(
            i.source,
            np.r_[scorer.tokenizer.bos_id, i.tokens],
            np.r_[False, True, i.scored[1:]],
            i.num_bytes,
        )
        for i in items
    ]
    found = score(scorer, doubled)
    for result, document in zip(found, task["docs"], strict=True):
        assert result.log_likelihood == pytest.approx(document["ll"][0], rel=1e-5)
    bits = -sum(s.log_likelihood for s in found) / np.log(2) / sum(i.num_bytes for i in items)
    assert bits == pytest.approx(task["metrics"]["bits_per_byte,none"], rel=1e-6)
    # we do not: the text alone is predicted, and the surprise at a second BOS, alike for all, is
    # not counted
    surprise = [
        two.log_likelihood - one.log_likelihood
        for two, one in zip(found, score(scorer, items), strict=True)
    ]
    assert all(-14 < difference < -7 for difference in surprise)
