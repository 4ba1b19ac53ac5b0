"""Unigram entropy against a plain count of the tokens."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from xinslm.data import unigram
from xinslm.data.dataset import open_dataset
from xinslm.data.unigram import unigram_bits_per_byte, unigram_nats


def targets(dataset, name):
    split = dataset.split(name)
    pairs = zip(split.tokens, split.mask, strict=True)
    return [int(token) for token, counts in pairs if counts]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", ["train", "validation"])
def test_it_is_the_loss_of_add_one_frequencies(world, monkeypatch, stored, name):
    monkeypatch.setattr(unigram, "_CHUNK", 1000)  # several chunks
    dataset = open_dataset(world.data)
    assert set(dataset.manifest["unigram_nats"]) == {"train", "validation"}
    if not stored:
        del dataset.manifest["unigram_nats"]
    counts, vocab = Counter(targets(dataset, "train")), dataset.manifest["vocab_size"]
    total = sum(counts.values()) + vocab
    wanted = targets(dataset, name)
    expected = sum(-math.log((counts[token] + 1) / total) for token in wanted) / len(wanted)
    assert unigram_nats(dataset, name) == pytest.approx(expected, rel=1e-9)
    num_bytes = int(dataset.split(name).document_bytes.sum())
    bits = expected * len(wanted) / math.log(2) / num_bytes
    assert unigram_bits_per_byte(dataset, name) == pytest.approx(bits, rel=1e-9)


def test_an_empty_split_has_none(world, tmp_path):
    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one text"}) + "\n")
    prepare.run(
        PrepareConfig(
            data_path=(str(tmp_path / "text.jsonl"),),
            tokenizer_path=world.tokenizer,
            output_dir=tmp_path / "data",
            validation_fraction=0,
        )
    )
    dataset = open_dataset(tmp_path / "data")
    assert unigram_nats(dataset, "validation") is None
    assert np.isfinite(unigram_nats(dataset, "train"))
