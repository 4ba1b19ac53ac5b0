"""A cache that is killed inside a shard: finished batches are not scored again, and the bytes are
those of an uninterrupted run.
"""

import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from other_tokenizers import cache_of_another_tokenizer
from xinslm.alignment.byte_prefix import BytePrefixAligner
from xinslm.cache import journal, score
from xinslm.cache.config import CacheConfig
from xinslm.cache.journal import ShardJournal
from xinslm.files import sha256_file
from xinslm.teachers.own import OwnTeacher

KILLED_AT = 5


@pytest.fixture
def calls(monkeypatch):
    """Tokens of each forward pass of a teacher."""
    sizes = []
    real = OwnTeacher.states_and_hidden

    def counted(self, texts, depths):
        sizes.append(sum(map(len, texts)))
        return real(self, texts, depths)

    monkeypatch.setattr(OwnTeacher, "states_and_hidden", counted)
    return sizes


def settings(kind, world, tmp_path):
    """Settings of a cache with one shard per split."""
    if kind == "byte_prefix":
        config = cache_of_another_tokenizer(world, tmp_path, "byte_prefix")[-1]
        return replace(config, shard_positions=10**6)
    depths = (0.5, 1.0) if kind == "hidden states" else ()
    return CacheConfig(
        str(world.teacher),
        world.data,
        tmp_path,
        hidden_state_depths=depths,
        max_seq_length=64,
        batch_tokens=512,
        device="cpu",
    )


def hashes(folder):
    return {p.relative_to(folder): sha256_file(p) for p in sorted(folder.glob("*/*.bin"))}


@pytest.mark.parametrize("kind", ["sparse", "hidden states", "byte_prefix"])
def test_only_the_killed_batch_is_scored_again(world, tmp_path, calls, kind):
    config = settings(kind, world, tmp_path)
    whole = replace(config, output_dir=tmp_path / "whole")
    calls.clear()
    score.run(whole)
    uninterrupted = list(calls)
    assert len(uninterrupted) > 2 * KILLED_AT
    killed = replace(config, output_dir=tmp_path / "killed")
    code = f"""
import os, signal
from pathlib import Path, PosixPath
import torch
torch.set_num_threads(1)
from xinslm.cache import journal, score
from xinslm.cache.config import CacheConfig
from xinslm.teachers.endpoint_config import EndpointConfig
from xinslm.teachers.own import OwnTeacher
journal.SAVE_SECONDS = 0.0
real, calls = OwnTeacher.states_and_hidden, []
def counted(self, *given):
    calls.append(1)
    if len(calls) == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *given)
OwnTeacher.states_and_hidden = counted
score.run({killed!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list(killed.output_dir.glob("*/*.bin")), "killed inside the first shard"
    calls.clear()
    score.run(killed)
    assert calls == uninterrupted[KILLED_AT - 1 :]
    assert hashes(killed.output_dir) == hashes(whole.output_dir)
    assert not list(killed.output_dir.glob("*/*.scratch"))


def test_ctrl_c_keeps_what_is_finished_at_once(world, tmp_path, calls, monkeypatch):
    config = replace(settings("sparse", world, tmp_path), output_dir=tmp_path / "c")
    real = OwnTeacher.logits

    def interrupted(self, states):
        if len(calls) == KILLED_AT:
            raise KeyboardInterrupt
        return real(self, states)

    monkeypatch.setattr(OwnTeacher, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score.run(config)
    monkeypatch.setattr(OwnTeacher, "logits", real)
    calls.clear()
    score.run(config)
    continued = list(calls)
    calls.clear()
    score.run(replace(config, output_dir=tmp_path / "whole"))
    assert continued == calls[KILLED_AT - 1 :]
    assert hashes(tmp_path / "c") == hashes(tmp_path / "whole")


def test_steps_are_written_at_least_every_minute_and_short_shards_never(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    array, path = np.arange(6, dtype=np.int32), tmp_path / "scratch"
    with ShardJournal(path) as kept:
        kept.keep(0, slice(0, 2), {"entries": array})
        assert not path.exists()
        now = 59.0
        kept.keep(1, np.array([3, 5]), {"entries": array})
        assert len(path.read_text().splitlines()) == 2
        kept.keep(2, slice(2, 3), {"entries": array})
    found = np.zeros(6, dtype=np.int32)
    with ShardJournal(path) as kept:
        assert kept.restore(0, slice(0, 2), {"entries": found})
        assert kept.restore(1, np.array([3, 5]), {"entries": found})
        assert not kept.restore(2, slice(2, 3), {"entries": found}), "finished without an error"
        assert not kept.restore(1, slice(0, 3), {"entries": found}), "of another size"
        assert not kept.restore(0, slice(0, 2), {"other": found})
    assert found.tolist() == [0, 1, 0, 3, 0, 5]


def test_progress_of_byte_prefix_alignment_moves_while_documents_are_aligned(
    world, tmp_path, monkeypatch
):
    """One group of documents: all predictions come before all alignment."""
    config = replace(
        settings("byte_prefix", world, tmp_path), batch_tokens=10**6, output_dir=tmp_path / "c"
    )
    reports, before_alignment, real = [], [], BytePrefixAligner.buckets

    def aligned(self, *given):
        before_alignment.append(reports[-1].done if reports else 0)
        return real(self, *given)

    monkeypatch.setattr(BytePrefixAligner, "buckets", aligned)
    score.run(config, lambda progress: reports.append(progress))
    done = [progress.done for progress in reports if progress.stage == "cache"]
    assert done == sorted(done) and done[-1] == reports[-1].total
    train = [x for x in before_alignment if x < 0.8 * done[-1]]
    assert 0 < before_alignment[0] < 0.55 * done[-1]
    assert len(set(train)) > 10, "documents are reported one by one"
