"""How texts of tasks become tokens and metrics: start tokens, words that are cut apart, characters,
and text that is changed before it is scored. References: `HFLM`, transformers, values by hand.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from small_models import save_random_model
from xinslm.errors import UsageError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from xinslm.evaluate.harness.model import XinslmLM  # noqa: E402
from xinslm.evaluate.harness.run import score_tasks  # noqa: E402
from xinslm.evaluate.harness.tasks import load_tasks  # noqa: E402

BOS = 0
START = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [BOS], "tokens": ["<|begin|>"]}},
}
"""A post-processor that puts BOS before a text."""


@pytest.fixture(scope="module", params=["no start", "BOS"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, max_position_embeddings=256)
    if request.param == "BOS":
        content = json.loads((path / "tokenizer.json").read_text()) | {"post_processor": START}
        (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return XinslmLM(str(folder), device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def hf(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)


def log_likelihood(model, ids) -> float:
    """Of all ids but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum().item()


def words(ours, text: str) -> list[int]:
    """Ids without a start token."""
    return ours.tok_encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", ["The fox", "<|begin|>The fox", " é"])
def test_a_text_has_the_start_of_its_tokenizer_once(ours, hf, folder, text):
    ids = ours.tok_encode(text)
    assert ids == hf.tok_encode(text)
    adds = json.loads((folder / "tokenizer.json").read_text())["post_processor"] == START
    assert ids.count(BOS) == int(adds or text.startswith("<|begin|>"))
    (pair,) = ours.pairs([(text, " x")])
    assert pair.context.tolist() == ids


def test_a_pair_begins_as_in_the_harness(ours, hf):
    texts = [("The fox", " jumps"), ("<|begin|>The fox", " jumps"), ("", "The fox")]
    requests = [SimpleNamespace(args=text) for text in texts]
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    for (value, flag), (reference, is_greedy) in zip(
        ours.loglikelihood(requests), expected, strict=True
    ):
        assert value == pytest.approx(reference, abs=1e-9) and flag == is_greedy


def test_rolling_text_is_predicted_from_one_bos(ours, hf):
    text = "The quick brown fox doesn't jump over the lazy dog."
    (value,) = ours.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = words(ours, text)
    assert value == pytest.approx(log_likelihood(hf.model, [BOS, *ids]), abs=1e-9)
    doubled = log_likelihood(hf.model, [BOS, BOS, *ids])
    assert abs(value - doubled) > 1


def test_a_word_may_be_cut_apart(ours, hf):
    """Tokens that merge across the border: the continuation is the rest of the tokens of both."""
    word = " quick reasons! jumps over naïve lazy dogs."
    texts = [(f"The{word[:cut]}", word[cut:]) for cut in range(1, len(word))]
    expected = [hf._encode_pair(*text) for text in texts]
    merged = 0
    for pair, (context, rest), text in zip(ours.pairs(texts), expected, texts, strict=True):
        assert (pair.context.tolist(), pair.continuation.tolist()) == (context, rest)
        whole = ours.tok_encode("".join(text))
        merged += whole[: len(context)] != context
    assert merged > 3


def write(folder, name, rows) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_normalized_accuracy_counts_characters(ours, tmp_path):
    """Not bytes, not tokens, and not the space before a choice."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": "The quick brown fox.",
            "ctx_b": "",
            "endings": ["".join(rng.choice(list("éaxzñ"), n)) for n in rng.integers(1, 9, 4)],
            "label": str(i % 4),
        }
        for i in range(30)
    ]
    write(tmp_path, "hellaswag_val.jsonl", rows)
    (score,) = score_tasks(ours, load_tasks(["hellaswag"], tmp_path))
    found = [item.metrics["acc_norm"] for item in score.items]
    lengths = {
        "characters": lambda choice: len(choice) - 1,
        "with the space": len,
        "bytes": lambda choice: len(choice.encode()) - 1,
        "tokens": lambda choice: len(words(ours, choice)),
        "none": lambda choice: 1,
    }
    for name, length in lengths.items():
        by_hand = []
        for item in score.items:
            pairs = zip(item.log_likelihoods, item.choices, strict=True)
            quotients = [ll / length(choice) for ll, choice in pairs]
            by_hand.append(float(np.argmax(quotients) == item.right))
        assert (found == by_hand) == (name == "characters"), name


def test_prompts_of_hellaswag_by_hand(ours, tmp_path):
    """`capitalize` makes the rest of ctx_b lower case."""
    cases = {
        ("Cooking", "A man sits.", "he sees Anna"): "Cooking: A man sits. He sees anna",
        ("How to cook", "[header] Boil [title] it.", ""): "How to cook: Boil. it. ",
        ("Golf", "Two  men", "USA wins"): "Golf: Two men Usa wins",
    }
    rows = [
        {"ind": i, "activity_label": a, "ctx_a": b, "ctx_b": c, "endings": list("abcd"), "label": 0}
        for i, (a, b, c) in enumerate(cases)
    ]
    write(tmp_path, "hellaswag_val.jsonl", rows)
    (score,) = score_tasks(ours, load_tasks(["hellaswag"], tmp_path))
    assert [item.prompt.strip() for item in score.items] == [x.strip() for x in cases.values()]


def test_the_text_form_of_hellaswag_is_not_taken(tmp_path):
    """llama.cpp's file is prepared already, and lacks the capital letters."""
    (tmp_path / "hellaswag_val.txt").write_text("Cooking: a man\n0\nsits\n")
    with pytest.raises(UsageError, match="has no data of Rowan/hellaswag"):
        load_tasks(["hellaswag"], tmp_path)


def test_words_of_wikitext_are_those_of_the_page_as_it_is(ours, hf, tmp_path):
    page = " = Dogs = \n \n Well @-@ known , they run . \n"
    scored = " = Dogs =\n\nWell-known, they run.\n"
    write(tmp_path, "wikitext_document_level_test.jsonl", [{"page": page}])
    (score,) = score_tasks(ours, load_tasks(["wikitext"], tmp_path))
    nats = -log_likelihood(hf.model, [BOS, *words(ours, scored)])
    # 10 words, and the empty ones that the harness counts at both ends
    assert score.metrics["word_perplexity"] == pytest.approx(math.exp(nats / 12))
    assert score.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(page))


def test_a_stop_string_in_the_prompt_ends_nothing(ours):
    context = "def f():\n# over\n#"

    def written(until):
        settings = {"until": until, "max_gen_toks": 24, "do_sample": False}
        return ours.generate_until([SimpleNamespace(args=(context, settings))])[0]

    free = written(["no such string"])
    assert len(free) > 5 and "\n#" not in free
    assert written(["\n#"]) == free
    assert written([free[4:6]]) == free.split(free[4:6])[0]
