"""Caches that are damaged, cut short, incomplete or of another version: named, and repaired without
the rest.
"""

import json
import shutil

import pytest

import training as train
from xinslm.cache import merge, score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.cache.merge_config import MergeConfig
from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_file

REPAIR = "run the command that made the cache again with --repair"


def config(world, folder, **changes):
    options = {
        "max_seq_length": 64,
        "shard_positions": 3000,
        "batch_tokens": 512,
        "device": "cpu",
        **changes,
    }
    return CacheConfig(str(world.teacher), world.data, folder, **options)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def hashes(folder):
    return {
        p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.glob("*/*.bin"))
    }


@pytest.fixture
def copy(world, tmp_path):
    return shutil.copytree(world.cache, tmp_path / "copy")


def test_an_intact_cache_passes_and_seen_its_progress(copy):
    seen = []
    Cache(copy).verify(seen.append)
    assert seen[-1].done == seen[-1].total > 0 and len(seen) == len(list(copy.glob("*/*.bin")))


def test_one_flipped_bit_stops_training_before_it_begins(world, copy, tmp_path):
    flip(copy / "train" / "00001.bin")
    Cache(copy)
    with pytest.raises(
        XinslmError, match=rf"copy/train/00001.bin: damaged.*Copy it again, or {REPAIR}"
    ):
        train.run(world.distill(tmp_path / "run", cache=copy))
    assert not (tmp_path / "run").exists()
    with pytest.raises(XinslmError, match=r"00001.bin: damaged"):
        merge.run(MergeConfig((copy, world.cache), tmp_path / "m"))


def test_files_cut_short_or_missing_are_named_with_the_repair(copy):
    (copy / "validation" / "00000.bin").unlink()
    with pytest.raises(XinslmError, match=rf"validation/00000.bin is missing.*{REPAIR}"):
        Cache(copy)
    shutil.copy(copy / "train" / "00000.bin", copy / "validation" / "00000.bin")
    with pytest.raises(
        XinslmError, match=rf"validation/00000.bin has .* bytes, the manifest says .*{REPAIR}"
    ):
        Cache(copy)


def test_another_format_version_is_named(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(
        XinslmError, match=r"format version 99, this xinslm reads version 3. Make it again"
    ):
        Cache(copy)


def test_repair_makes_only_what_is_damaged(world, copy):
    flip(copy / "train" / "00002.bin")
    (copy / "train" / "00000.bin").unlink()
    kept = {
        p: p.stat().st_mtime_ns
        for p in copy.glob("*/*.bin")
        if not p.name.startswith(("00000.", "00002."))
    }
    with pytest.raises(
        UsageError, match=r"copy was made with another seed: its files would not belong together"
    ):
        score.run(config(world, copy, repair=True, seed=3))
    score.run(config(world, copy, repair=True))
    assert hashes(copy) == hashes(world.cache)
    assert kept and all(p.stat().st_mtime_ns == then for p, then in kept.items())
    assert Cache(copy).manifest["inputs"] == Cache(world.cache).manifest["inputs"]
    with pytest.raises(UsageError, match="is intact: there is nothing to repair"):
        score.run(config(world, copy, repair=True))


def test_an_interrupted_repair_continues(world, copy):
    flip(copy / "train" / "00000.bin")

    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        score.run(config(world, copy, repair=True), stop)
    with pytest.raises(UsageError, match="unfinished cache"):
        Cache(copy)
    score.run(config(world, copy))
    assert hashes(copy) == hashes(world.cache)


def test_a_merged_cache_is_repaired_too(world, tmp_path):
    options = {"weights": (2, 1), "shard_positions": 3000}
    merge.run(MergeConfig((world.cache, world.cache), tmp_path / "m", **options))
    before = hashes(tmp_path / "m")
    flip(tmp_path / "m" / "train" / "00001.bin")
    merge.run(MergeConfig((world.cache, world.cache), tmp_path / "m", repair=True, **options))
    assert hashes(tmp_path / "m") == before


def test_there_is_nothing_to_repair_where_there_is_no_cache(world, tmp_path):
    with pytest.raises(UsageError, match="is not a finished cache"):
        score.run(config(world, tmp_path / "none", repair=True))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_a_damaged_file_of_tail_samples_is_named_and_repaired(world, copy, harm):
    file = copy / "train" / "00001.tail.bin"
    flip(file) if harm == "flip" else file.unlink()
    with pytest.raises(XinslmError, match=r"train/00001.tail.bin(: damaged| is missing)"):
        Cache(copy).check()
    score.run(config(world, copy, repair=True))
    assert hashes(copy) == hashes(world.cache)
