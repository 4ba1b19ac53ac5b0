"""Prompts out of datasets, and which tokens the heads of the records hold."""

import json

import numpy as np
import pytest
import torch

from xinslm.cache.support import top_k_ids
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.errors import UsageError
from xinslm.rollouts.student_texts import find_prompts
from xinslm.tokenizer.load import load_tokenizer


def test_head_ids_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    for vocabulary, top_k in ((40, 13), (14, 13), (300, 20)):
        probs = torch.softmax(4 * torch.randn(50, vocabulary, generator=generator), dim=1)
        support = torch.rand(50, vocabulary, generator=generator).topk(top_k - 5, dim=1).indices
        labels = torch.randint(vocabulary, (50,), generator=generator)
        found = top_k_ids(probs, support, labels, top_k)
        for row in range(50):
            expected = list(support[row].tolist())
            for token in [int(labels[row]), *probs[row].argsort(descending=True).tolist()]:
                if len(expected) < top_k and token not in expected:
                    expected.append(token)
            assert found[row].tolist() == expected


def test_masked_beginnings_are_prompts(world, tmp_path):
    lines = [
        {"prompt": f"What is {i}?" + " Say it." * (i % 9), "response": f"It is {i}."}
        for i in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "data"
    text = str(tmp_path / "chat.jsonl")
    prepare.run(PrepareConfig(data_path=(text,), tokenizer_path=world.tokenizer, output_dir=folder))
    tokenizer, dataset = load_tokenizer(world.tokenizer), open_dataset(folder)
    asked = {
        tuple(_asked(tokenizer, line["prompt"])): len(_asked(tokenizer, line["prompt"]))
        for line in lines
    }
    longest = sorted(asked.values())[30]
    prompts = find_prompts(dataset, 5, longest)
    taken = [tuple(p.tolist()) for p in prompts.take(np.arange(len(prompts)))]
    assert set(taken) <= set(asked) and max(map(len, taken)) <= longest
    count = len(dataset.split("train").documents) - 1
    assert len(prompts) + prompts.skipped == count and prompts.skipped > 5
    with pytest.raises(UsageError, match="no prompt of at most 3 tokens"):
        find_prompts(dataset, 5, 3)


def _asked(tokenizer, text):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )[0]


def test_plain_texts_give_their_beginnings(world):
    dataset = open_dataset(world.data)
    split = dataset.split("train")
    prompts = find_prompts(dataset, 20, 60)
    lengths = np.diff(split.documents)
    assert len(prompts) == len(lengths) and prompts.skipped == 0
    for number, prompt in enumerate(prompts.take(np.arange(len(prompts)))):
        a = split.documents[number]
        expected = min(20, lengths[number] // 2)
        assert prompt.tolist() == split.tokens[a : a + expected].tolist()
