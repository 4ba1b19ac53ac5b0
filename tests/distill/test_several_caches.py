"""`distill --cache A --more-caches B`: teachers with different tokenizers in one run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import training as train
from other_tokenizers import cache_of_another_tokenizer
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.distill.auxiliary_config import HiddenConfig
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError
from xinslm.export.config import HfConfig
from xinslm.export.packed_folder import run_hf
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.train.config import PretrainConfig

SHAPE = {
    "max_seq_length": 64,
    "batch_size": 2,
    "max_steps": 2,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def buckets(world, tmp_path_factory) -> Path:
    """A cache of the world's dataset by a teacher with another tokenizer."""
    folder = tmp_path_factory.mktemp("buckets")
    data = cache_of_another_tokenizer(world, folder, "byte_prefix")[0]
    train.run(PretrainConfig(data_path=data, output_dir=folder / "teacher", **SHAPE))
    made = score.run(
        CacheConfig(str(folder / "teacher"), world.data, folder / "own", max_seq_length=64)
    )
    assert made.alignment == "byte_prefix"
    return folder / "own"


@pytest.fixture
def base(world, tmp_path) -> DistillConfig:
    return DistillConfig(
        data_path=world.data, output_dir=tmp_path / "run", cache=world.cache, **SHAPE
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_teachers_with_different_tokenizers_teach_together(base, buckets, world, tmp_path):
    kd = {}
    for name, changes in {
        "own": {},
        "other": {"cache": buckets},
        "both": {"more_caches": (buckets,), "cache_weights": (3.0, 1.0)},
        "one": {"more_caches": (buckets,), "cache_weights": (2.0, 0.0)},
    }.items():
        train.run(replace(base, output_dir=tmp_path / name, **changes))
        kd[name] = metrics(tmp_path / name)[0]["kd"]
    assert kd["one"] == pytest.approx(kd["own"], abs=1e-5)
    assert min(kd["own"], kd["other"]) < kd["both"] < max(kd["own"], kd["other"])
    assert {"cache", "cache_2"} <= set(
        json.loads((tmp_path / "both/run.json").read_text())["inputs"]
    )
    quantize(QuantizeConfig(model=tmp_path / "both", output_dir=tmp_path / "small", method="rtn"))
    run_hf(HfConfig(model=tmp_path / "small", output_dir=tmp_path / "hf"))
    card = (tmp_path / "hf/README.md").read_text()
    assert "by its cached distributions (weight 3)" in card
    assert "by its cached distributions (weight 1)" in card


def test_a_run_goes_on_only_with_the_same_caches(base, buckets, world):
    mixed = replace(base, more_caches=(buckets,))
    train.run(mixed)
    with pytest.raises(UsageError, match="cache"):
        train.run(replace(base, max_steps=3))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"cache": None, "teacher": "t", "more_caches": (Path("b"),)}, "need --cache"),
        ({"cache": None, "teacher": "t", "cache_weights": (1.0,)}, "need --cache"),
        ({"more_caches": (Path("a/../c"), Path("c"))}, "one folder twice"),
        ({"more_caches": (Path("b"),), "cache_weights": (1.0,)}, "1 weights are given for 2"),
        ({"more_caches": (Path("b"),), "cache_weights": (1.0, -1.0)}, "at least 0"),
        ({"more_caches": (Path("b"),), "cache_weights": (0.0, 0.0)}, "one above 0"),
        ({"cache_weights": (2.0,)}, "no effect without more_caches"),
    ],
)
def test_lists_of_caches_that_cannot_work_are_refused(base, changes, wrong):
    assert any(wrong in error for error in replace(base, **changes).errors())


def test_an_encoders_cache_does_not_mix(base, world, tmp_path):
    score.run(
        CacheConfig(
            str(world.teacher),
            world.data,
            tmp_path / "h",
            max_seq_length=64,
            hidden_state_depths=(1.0,),
        )
    )
    folder = tmp_path / "h"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["hidden_states"]["alone"] = True
    (folder / "manifest.json").write_text(json.dumps(manifest))
    matched = replace(base, hidden=HiddenConfig(weight=1.0, depths=(1.0,)))
    with pytest.raises(UsageError, match="--hidden-states"):
        train.run(replace(matched, cache=folder, more_caches=(world.cache,)))
