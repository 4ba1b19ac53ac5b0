"""The cache stage: equal to a direct computation, exact after a kill, and what it refuses."""

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xinslm.alignment.nested import NestedProjection, is_nested, number_prefixes
from xinslm.cache import score, scorers
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import PLAN, Cache
from xinslm.data.dataset import open_dataset
from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_file
from xinslm.losses.targets import NO_MASS
from xinslm.model.config import ModelConfig
from xinslm.model.files import load_model, save_model
from xinslm.model.transformer import Transformer
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.load import load_tokenizer


def config(world, output_dir, **changes):
    settings = {
        "max_seq_length": 64,
        "shard_positions": 3000,
        "batch_tokens": 512,
        "device": "cpu",
        **changes,
    }
    teacher = settings.pop("teacher", str(world.teacher))
    return CacheConfig(teacher, settings.pop("data_path", world.data), output_dir, **settings)


def shards(folder):
    return {
        p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.glob("*/*.bin"))
    }


def test_entries_are_the_teachers_distributions(world):
    split = open_dataset(world.data).split("train")
    model = load_model(world.teacher)
    cache = Cache(world.cache).split("train")
    for document in (0, 3, len(split.documents) - 2):
        start, end = (int(x) for x in split.documents[document : document + 2])
        ids = torch.from_numpy(split.tokens[start:end].astype(np.int64))
        context = ids[:64][None] if end - start > 64 else ids[None]
        with torch.no_grad():
            log_p = model.logits(model.hidden(context))[0].log_softmax(1)
        count = min(64, end - start - 1)
        targets = cache.targets(np.arange(start, start + count))
        top = log_p[:count].topk(targets.top_k_ids.shape[1])
        expected = log_p[:count].gather(1, targets.top_k_ids)
        torch.testing.assert_close(targets.top_k_log_probs, expected, atol=0.06, rtol=0.02)
        torch.testing.assert_close(expected.min(1).values, top.values[:, -1], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            targets.log_tail, (1 - top.values.exp().sum(1)).log(), atol=0.01, rtol=0.02
        )
        entries = (
            cache.fixed_parts[0][start - cache.starts[0] : start - cache.starts[0] + count]
            if start < 2000
            else None
        )
        if entries is not None:
            label = log_p[:count].gather(1, ids[1 : count + 1, None])[:, 0]
            torch.testing.assert_close(
                torch.from_numpy(entries["log_label"].astype(np.float32)),
                label,
                atol=0.01,
                rtol=2e-3,
            )


def test_last_token_of_a_document_has_no_record(world):
    split = open_dataset(world.data).split("train")
    valid = (
        Cache(world.cache).split("train").targets(np.arange(len(split.tokens))).valid_mask.numpy()
    )
    last = np.zeros(len(split.tokens), dtype=bool)
    last[split.documents[1:] - 1] = True
    assert np.array_equal(valid, ~last)


@pytest.mark.parametrize("after", [1, 5])
def test_killed_and_continued_equals_uninterrupted(world, tmp_path, after):
    folder = tmp_path / "cache"
    code = f"""
import os, signal
from pathlib import Path, PosixPath
import torch
torch.set_num_threads(1)
from xinslm.cache import score, scorers
from xinslm.cache.config import CacheConfig
from xinslm.teachers.endpoint_config import EndpointConfig
def listen(progress):
    if len(list(Path({str(folder)!r}).glob('train/?????.bin'))) >= {after}:
        os.kill(os.getpid(), signal.SIGKILL)
score.run({config(world, folder)!r}, listen)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(
        UsageError, match="unfinished cache: run the same `xinslm cache` command again"
    ):
        Cache(folder)
    (folder / "train" / ".00009.bin.partial-1").write_bytes(b"half")
    with pytest.raises(UsageError, match="unfinished cache with another seed"):
        score.run(config(world, folder, seed=1))
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("train/?????.bin")}
    score.run(config(world, folder))
    assert shards(folder) == shards(world.cache)
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items()) and len(kept) == after
    assert not (folder / PLAN).exists() and not list(folder.glob("*/.*"))
    assert (
        json.loads((folder / "manifest.json").read_text())["inputs"]
        == Cache(world.cache).manifest["inputs"]
    )


def test_batch_size_changes_nothing_but_rounding(world, tmp_path):
    score.run(config(world, tmp_path / "c", batch_tokens=64, shard_positions=10**6))
    positions = np.arange(3000)
    a = Cache(world.cache).split("train").targets(positions)
    b = Cache(tmp_path / "c").split("train").targets(positions)
    torch.testing.assert_close(a.log_tail, b.log_tail, atol=2e-3, rtol=1e-3)
    assert (a.tail_ids == b.tail_ids).float().mean() > 0.99


def test_padded_rows_of_the_teachers_head_do_not_count(world, tmp_path):
    """A row of zeros has logit 0, which is mass; rows that no token has must be cut off, not
    scored.
    """
    model = load_model(world.teacher)
    wide = Transformer(dataclasses.replace(model.config, vocab_size=model.config.vocab_size + 128))
    state = model.state_dict()
    extra = 3 * torch.randn(128, model.config.hidden_size)
    state["model.embed_tokens.weight"] = torch.cat((state["model.embed_tokens.weight"], extra))
    wide.load_state_dict(state)
    save_model(wide, tmp_path / "wide")
    load_tokenizer(world.teacher).save(tmp_path / "wide")
    score.run(config(world, tmp_path / "c", teacher=str(tmp_path / "wide")))
    a, b = Cache(world.cache).split("train"), Cache(tmp_path / "c").split("train")
    positions = np.arange(2000)
    assert (a.targets(positions).top_k_ids == b.targets(positions).top_k_ids).float().mean() > 0.999


def test_scoring_twice_gives_the_same_bytes(world, tmp_path):
    """Dropout or a teacher left in training mode would show here."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "teacher"
    shutil.copytree(world.teacher, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.5}))
    assert AutoModelForCausalLM.from_pretrained(folder).config.attention_dropout == 0.5
    score.run(config(world, tmp_path / "c", teacher=str(folder)))
    assert shards(tmp_path / "c") == shards(world.cache)


def test_entries_do_not_depend_on_how_many_rows_are_encoded_together(world, tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "ROWS_AT_ONCE", 5)
    score.run(config(world, tmp_path / "c"))
    assert shards(tmp_path / "c") == shards(world.cache)


def nested_world(world, tmp_path, vocab_size=300):
    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig

    teacher = load_tokenizer(world.teacher)
    student = BPETokenizer.prefix_of(teacher, vocab_size)
    student.save(tmp_path / "tokenizer")
    data = tmp_path / "nested"
    prepare.run(
        PrepareConfig(
            data_path=(str(world.text),), tokenizer_path=tmp_path / "tokenizer", output_dir=data
        )
    )
    return student, teacher, data


def test_nested_distributions_equal_a_sum_over_teacher_tokens(world, tmp_path):
    student, teacher, _ = nested_world(world, tmp_path)
    assert is_nested(student, teacher) and not is_nested(teacher, student)
    projection = NestedProjection(student, teacher)
    probs = (
        3 * torch.randn(40, teacher.vocab_size, generator=torch.Generator().manual_seed(0))
    ).softmax(1)
    prefixes = sorted({p[:size] for p in projection.pieces for size in range(1, len(p))})[:39]
    numbers = [number_prefixes(projection.pieces)[prefix] for prefix in ((), *prefixes)]
    pushed = projection(probs, np.array(numbers))
    for row, prefix in enumerate([(), *prefixes]):
        expected = torch.zeros(student.vocab_size)
        given = 0.0
        for token, pieces in enumerate(projection.pieces):
            if pieces[: len(prefix)] == prefix and (pieces or not prefix):
                given += probs[row, token].item()
                if len(pieces) > len(prefix):
                    expected[pieces[len(prefix)]] += probs[row, token].item()
        torch.testing.assert_close(pushed[row], expected / given, atol=1e-5, rtol=1e-4)


def test_nested_cache_at_teacher_boundaries_is_the_push_forward_of_the_teacher(world, tmp_path):
    student, teacher, data = nested_world(world, tmp_path)
    score.run(config(world, tmp_path / "c", data_path=data))
    split = open_dataset(data).split("train")
    cache = Cache(tmp_path / "c").split("train")
    projection, model = NestedProjection(student, teacher), load_model(world.teacher)
    start, end = (int(x) for x in split.documents[2:4])
    ids = split.tokens[start:end].astype(np.int64)
    aligned = projection.align(ids)
    assert student.decode(ids.tolist()) == teacher.decode(aligned.teacher_ids.tolist())
    with torch.no_grad():
        probs = model.logits(model.hidden(torch.from_numpy(aligned.teacher_ids)[None, :64]))[
            0
        ].softmax(1)
    inside = 0
    for position, (row, prefix) in enumerate(zip(aligned.rows, aligned.prefixes, strict=True)):
        if row >= 60:
            break
        expected = projection(probs[row : row + 1], np.array([prefix]))[0]
        targets = cache.targets(np.array([start + position]))
        torch.testing.assert_close(
            targets.top_k_log_probs.exp()[0], expected[targets.top_k_ids[0]], atol=0.02, rtol=0.05
        )
        ends_here = 1 - float(expected.sum()) > 1e-5
        if ends_here or targets.log_tail[0] > NO_MASS:
            assert bool(targets.num_samples[0]) == (not ends_here)
        inside += int(prefix > 0)
    assert inside > 3


def test_foreign_tokenizer_is_refused_with_both_ways_out(world, tmp_path):
    folder = tmp_path / "foreign"
    tokenizer = BPETokenizer(vocab_size=300)
    tokenizer.train(["some other text about other things"])
    save_model(Transformer(ModelConfig(300, 32, 64, 1, 2, 2, 16)), folder)
    tokenizer.save(folder)
    with pytest.raises(
        UsageError,
        match=r"(?s)tokenizers differ \(400 and 282 ids\).*not a merge prefix.*--prefix-of",
    ):
        score.run(config(world, tmp_path / "c", teacher=str(folder), alignment="nested"))
    assert not (tmp_path / "c").exists()


def test_other_refusals(world, tmp_path):
    with pytest.raises(UsageError, match="has a context of 64 tokens: pass --max-seq-length 64"):
        score.run(config(world, tmp_path / "c", max_seq_length=128))
    with pytest.raises(UsageError, match="there is no model at"):
        score.run(config(world, tmp_path / "c", teacher="nowhere"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UsageError, match="already holds something"):
        score.run(config(world, tmp_path / "full", force=True))
    score.run(config(world, tmp_path / "done"))
    with pytest.raises(UsageError, match=r"already holds a finished cache.*--force"):
        score.run(config(world, tmp_path / "done"))
    damaged = next((tmp_path / "done").glob("train/*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(XinslmError, match="damaged or half-copied"):
        Cache(tmp_path / "done")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_full_disk_and_ctrl_c_cost_one_shard(world, tmp_path, monkeypatch, error):
    folder, real, calls = tmp_path / "cache", Path.write_bytes, []

    def fail(self, data):
        if ".bin" in self.name:
            calls.append(self)
            if len(calls) == 4:
                real(self, data[: len(data) // 2])
                raise error
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(type(error)):
        score.run(config(world, folder))
    monkeypatch.undo()
    names = sorted(p.name for p in (folder / "train").iterdir())
    assert names == ["00000.bin", "00000.tail.bin", "00001.bin"], "one lacks its second file"
    score.run(config(world, folder))
    assert shards(folder) == shards(world.cache)


def test_tokenizer_of_another_model_in_the_teachers_folder(world, tmp_path):
    """More ids than the model has rows: the tokenizer files were copied from elsewhere."""
    small = Transformer(dataclasses.replace(load_model(world.teacher).config, vocab_size=350))
    save_model(small, tmp_path / "small")
    load_tokenizer(world.teacher).save(tmp_path / "small")
    with pytest.raises(
        XinslmError, match="the tokenizer has 400 ids, but the model's embedding only 350 rows"
    ):
        score.run(config(world, tmp_path / "c", teacher=str(tmp_path / "small")))


def test_teacher_with_missing_or_quantized_weights_is_refused(world, tmp_path):
    """Whoever runs it: transformers would draw what is missing at random and go on."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(world.teacher, tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    part = str(tmp_path / "part")
    for trust, said in ((False, "missing, the first is"), (True, "missing or misshapen, such as")):
        with pytest.raises(
            XinslmError, match=rf"1 weights are {said} 'model.layers.1.mlp.up_proj.weight'"
        ):
            score.run(config(world, tmp_path / "c", teacher=part, trust_remote_code=trust))
    (tmp_path / "part" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(XinslmError, match="is not a complete safetensors file"):
        score.run(config(world, tmp_path / "c", teacher=part))


def test_force_never_deletes_what_is_read(world, tmp_path):
    shutil.copytree(world.data, tmp_path / "data")
    with pytest.raises(UsageError, match="already holds something"):
        score.run(config(world, tmp_path / "data", data_path=tmp_path / "data", force=True))
    score.run(config(world, tmp_path / "c"))
    shutil.copytree(world.data, tmp_path / "c" / "data")
    with pytest.raises(UsageError, match="--force would delete"):
        score.run(config(world, tmp_path / "c", data_path=tmp_path / "c" / "data", force=True))
    assert (tmp_path / "data" / "train" / "tokens.bin").is_file()


def test_teacher_that_is_not_finite_is_named_and_nothing_is_half_written(world, tmp_path):
    model = load_model(world.teacher)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    save_model(model, tmp_path / "bad")
    load_tokenizer(world.teacher).save(tmp_path / "bad")
    with pytest.raises(
        XinslmError,
        match=r"teacher .*bad: the teacher's distribution at position \d+ is not finite",
    ):
        score.run(config(world, tmp_path / "c", teacher=str(tmp_path / "bad")))
    assert not list((tmp_path / "c").glob("*/*"))


def test_pickle_weights_are_refused(world, tmp_path):
    shutil.copytree(world.teacher, tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").rename(tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(XinslmError, match=r"safetensors|pickle"):
        score.run(config(world, tmp_path / "c", teacher=str(tmp_path / "p")))
