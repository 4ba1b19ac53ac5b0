"""Values that lm-evaluation-harness 0.4.13 printed for a real model, in float64, on real items.

MMLU's prompts are longer than the model's context of 512 tokens, and its letters are several tokens
of the vocabulary of 512.
"""

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from xinslm.evaluate.harness.model import XinslmLM
from xinslm.evaluate.harness.run import score_tasks
from xinslm.evaluate.harness.tasks import load_tasks

NUM_ITEMS = {
    "hellaswag": ("hellaswag_local", 12),
    "truthfulqa_mc1": ("tqa_mc1_local", 6),
    "truthfulqa_mc2": ("tqa_mc2_local", 6),
    "mmlu_abstract_algebra": ("mmlu_local_abstract_algebra", 2),
}
"""The golden task, and how many of its items are scored here."""


def test_items_equal_golden_values(shared_data: Path) -> None:
    path = shared_data / "bench" / "golden_lmeval_0.4.13_stories260K.json"
    golden = json.loads(path.read_text())["tasks"]
    expected = {name: golden[own]["docs"][:count] for name, (own, count) in NUM_ITEMS.items()}
    model = XinslmLM(str(shared_data / "models" / "stories260K"), "cpu", "float64")
    names = [f"{name}:5" if "mmlu" in name else name for name in NUM_ITEMS]
    loaded = load_tasks(names, shared_data / "bench")
    chosen = {name: [(name, doc["id"]) for doc in docs] for name, docs in expected.items()}
    scores = {score.name: score for score in score_tasks(model, loaded, chosen=chosen)}
    for name, docs in expected.items():
        for item, doc in zip(scores[name].items, docs, strict=True):
            assert item.log_likelihoods == pytest.approx(doc["ll"], abs=1e-9)
            assert hashlib.sha256(item.prompt.encode()).hexdigest() == doc["prompt_hash"]
    mmlu = scores["mmlu_abstract_algebra"]
    assert mmlu.truncated == 4 * len(mmlu.items)
    (pair,) = model.pairs([("Answer:", " A")])
    assert len(pair.continuation) > 1
