"""What a run may learn from: refusals, and a GGUF file as live teacher."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import training as train
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.distill.auxiliary_config import HiddenConfig
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError
from xinslm.export import gguf
from xinslm.export.config import GgufConfig


@pytest.fixture
def base(world, tmp_path) -> DistillConfig:
    return DistillConfig(
        data_path=world.data,
        output_dir=tmp_path / "run",
        teacher=str(world.teacher),
        max_seq_length=64,
        batch_size=2,
        max_steps=2,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
    )


@pytest.fixture
def gguf_file(world, tmp_path) -> Path:
    path = tmp_path / "teacher.gguf"
    gguf.run(GgufConfig(model=world.teacher, output_path=path, outtype="f32"))
    return path


def test_a_gguf_file_teaches_live_as_its_folder_does(base, gguf_file, tmp_path):
    runs = [replace(base, output_dir=tmp_path / name) for name in ("folder", "file")]
    a = train.run(runs[0])
    b = train.run(replace(runs[1], teacher=str(gguf_file)))
    assert a.validation is not None and b.validation is not None
    assert b.validation.ce == pytest.approx(a.validation.ce, abs=1e-4)
    assert b.validation.kd == pytest.approx(a.validation.kd, abs=1e-4)


def test_a_gguf_files_hidden_states_are_those_of_its_folder(base, gguf_file, tmp_path):
    matched = replace(base, hidden=HiddenConfig(weight=1.0))
    train.run(replace(matched, output_dir=tmp_path / "folder"))
    train.run(replace(matched, output_dir=tmp_path / "file", teacher=str(gguf_file)))
    first = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("folder", "file")
    ]
    assert first[0]["hidden"] > 0
    assert first[1]["hidden"] == pytest.approx(first[0]["hidden"], abs=1e-4)


def test_a_cache_of_a_gguf_file_knows_it_again(base, gguf_file, world, tmp_path):
    cache = tmp_path / "cache"
    score.run(
        CacheConfig(
            teacher=str(gguf_file), data_path=world.data, output_dir=cache, max_seq_length=64
        )
    )
    train.run(replace(base, cache=cache, teacher=str(gguf_file)))
    with pytest.raises(UsageError, match="made by another teacher"):
        train.run(
            replace(base, cache=cache, teacher=str(world.teacher), output_dir=tmp_path / "other")
        )


def test_an_endpoint_is_no_live_teacher(base):
    with pytest.raises(UsageError, match=r"cannot teach step by step.*xinslm cache http://host/v1"):
        train.run(replace(base, teacher="http://host/v1"))
