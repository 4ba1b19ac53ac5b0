"""Chunk likelihoods: sums over spans by brute force, spans that a batch cuts, and the way into
training.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from other_tokenizers import byte_level, cache_of_another_tokenizer, metaspace
from xinslm.alignment.spans import SpanAligner
from xinslm.cache import score
from xinslm.cache.chunks import SPAN, CachedSpans, span_records
from xinslm.cache.entries import Cache
from xinslm.data.dataset import Split, open_dataset
from xinslm.data.packing import PackedRows
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError
from xinslm.model.files import load_model
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train import run as train


@pytest.fixture(scope="module")
def chunked(world, tmp_path_factory):
    return cache_of_another_tokenizer(world, tmp_path_factory.mktemp("chunks"), "chunks")


def test_a_span_is_the_product_of_its_tokens_by_the_model(world, chunked):
    data, folder, result, _ = chunked
    assert (
        result.alignment == "chunks"
        and result.share > 0.9
        and result.record_bytes == SPAN.itemsize == 6
    )
    assert "spans" in result.describe()
    student, teacher, model = (
        load_tokenizer(data / "tokenizer"),
        load_tokenizer(world.teacher),
        load_model(world.teacher),
    )
    split, cache = open_dataset(data).split("train"), CachedSpans(Cache(folder), "train")
    records = np.concatenate([np.asarray(m) for m in cache.maps])
    for document in (0, 3):
        start, end = (int(x) for x in split.documents[document : document + 2])
        ids = np.asarray(split.tokens[start:end]).astype(np.int64)
        text = student.decode(ids[1:-1].tolist())
        theirs = np.array([teacher.bos_id, *teacher.encode(text), teacher.eos_id])
        with torch.no_grad():
            log_p = model.logits(model.hidden(torch.from_numpy(theirs)[None, :64]))[0].log_softmax(
                1
            )
        per_token = log_p[np.arange(64), theirs[1:65]].numpy()
        ours_at = np.cumsum([0, *(len(student.token_bytes(i)) for i in ids[1:-1])]) - 1
        theirs_at = np.cumsum([0, *(len(teacher.token_bytes(i)) for i in theirs[1:-1])])
        ours_at[0] = 0
        shared = sorted(set(ours_at.tolist()) & set(theirs_at.tolist()))
        checked = 0
        for a, b in pairwise(shared):
            tokens = [k for k in range(len(theirs_at) - 1) if a <= theirs_at[k] < b]
            if max(tokens) >= 60:
                break
            mine = [k for k in range(len(ours_at) - 1) if a <= ours_at[k] < b]
            of_span = records[start + mine[0] : start + mine[-1] + 1]  # record i is of token i + 1
            assert of_span["size"].tolist() == [len(mine)] * len(mine)
            assert of_span["place"].tolist() == list(range(len(mine)))
            np.testing.assert_allclose(
                of_span["log_prob"], per_token[tokens].sum(), rtol=1e-4, atol=1e-4
            )
            checked += 1
        assert checked > 15
        assert records[end - 1]["size"] == 0


def test_no_span_is_half_counted_wherever_rows_cut(chunked):
    """Rows of 7 inputs cut many spans; what is left is whole, and each span's positions carry its
    own likelihood.
    """
    data, folder, _, _ = chunked
    split, source = open_dataset(data).split("train"), CachedSpans(Cache(folder), "train")
    records = np.concatenate([np.asarray(m) for m in source.maps])
    rows = PackedRows(split, 7)
    whole = cut = 0
    for indices in (np.arange(0, 40), np.array([5, 3, 90, 17])):
        batch = rows.batch(indices)
        chosen = np.flatnonzero(batch.labels.ravel() >= 0)
        for some in (chosen, chosen[::2], np.delete(chosen, [4, 20])):
            found = source.targets(batch, some, torch.device("cpu"))
            found.starts()  # raises where a span is in pieces
            spans = found.spans.numpy()
            stream = batch.stream.ravel()[some]
            for number in np.unique(spans[spans >= 0]):
                of_span = records[stream[spans == number]]
                assert of_span["place"].tolist() == list(range(of_span["size"][0]))
                assert set(found.log_probs.numpy()[spans == number]) == {of_span["log_prob"][0]}
                places = some[spans == number]
                assert len(set(batch.segments.ravel()[places])) == len(set(places // 7)) == 1
                whole += 1
            cut += int(((records[stream]["size"] > 0) & (spans < 0)).sum())
    assert whole > 100 and cut > 5


def test_a_span_across_two_sequences_of_one_row_is_left_out():
    """A long document's second piece may stand behind its first in the row; their contexts
    differ.
    """
    records = np.zeros(12, dtype=SPAN)
    records["size"][3:6], records["place"][3:6], records["log_prob"][3:6] = 3, [0, 1, 2], -1.5

    class OneShard(CachedSpans):
        def __init__(self):
            self.starts, self.maps = np.array([0]), [records]

    split = Split(np.arange(12) % 5, np.ones(12, np.uint8), np.array([0, 12]), np.array([12]), 5)
    for length, expected in ((4, 0), (11, 3)):
        rows = PackedRows(split, 12, length)
        batch = rows.batch(np.arange(len(rows)))
        chosen = np.flatnonzero(batch.labels.ravel() >= 0)
        assert (
            int((OneShard().targets(batch, chosen, torch.device("cpu")).spans >= 0).sum())
            == expected
        )


def test_unknown_and_foreign_tokens_spoil_their_span_alone():
    student, teacher = byte_level(400), metaspace(300)
    marker = student.special_tokens["<|im_start|>"]
    ids = np.array(
        [
            student.bos_id,
            *student.encode("the dog ran"),
            marker,
            *student.encode("so it was"),
            student.eos_id,
        ]
    )
    pair = SpanAligner(student, teacher).align(ids)
    log_probs = np.full(len(pair.teacher_ids), -1.0)
    log_probs[0] = np.nan
    good = span_records(pair, log_probs)
    place = int(np.flatnonzero(ids == marker)[0])
    assert (
        good["size"][place - 1] == 0
        and good["size"][-1] == 0
        and (good["size"][:-1] > 0).sum() > len(ids) - 8
    )
    log_probs[5] = np.nan
    worse = span_records(pair, log_probs)
    assert 0 < (good["size"] > 0).sum() - (worse["size"] > 0).sum() < 5


def test_training_takes_them_and_other_uses_are_refused(world, chunked, tmp_path):
    data, folder, _, _ = chunked
    settings = {**world.settings, "max_steps": 20, "learning_rate": 5e-3, "validate_every": 10}
    result = train.run(
        DistillConfig(data_path=data, output_dir=tmp_path / "run", cache=folder, **settings)
    )
    assert (
        result.validation is not None
        and result.validation.kd is not None
        and np.isfinite(result.validation.kd)
    )
    with pytest.raises(UsageError, match="holds likelihoods of spans of text"):
        Cache(folder).split("train")
    with pytest.raises(UsageError, match="holds distributions, no span likelihoods"):
        CachedSpans(Cache(world.cache), "train")


def test_shards_are_made_again_alike(chunked, tmp_path):
    _, folder, _, config = chunked
    score.run(replace(config, output_dir=tmp_path / "c", shard_positions=10**6, batch_tokens=200))
    once, again = (
        np.concatenate([np.asarray(m) for m in CachedSpans(Cache(f), "train").maps])
        for f in (folder, tmp_path / "c")
    )
    assert (once["size"] == again["size"]).all() and (once["place"] == again["place"]).all()
    np.testing.assert_allclose(once["log_prob"], again["log_prob"], atol=1e-3)
