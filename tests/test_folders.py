"""Output folders against kills, a second command, and hands that delete while they are written."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from xinslm import files
from xinslm.data.dataset import open_dataset
from xinslm.errors import UsageError, XinslmError
from xinslm.files import write_json, write_manifest
from xinslm.folders import Plan, claim, locked, new_folder, refuse_existing

DEAD = 2**22 + 1
"""A process id above Linux' largest: no process has it."""


def plan(**settings) -> Plan:
    return Plan("plan.json", {"settings": settings}, "cache", "cache", also=("config.yaml",))


def begin(folder, force=False, **settings) -> bool:
    with claim(folder, plan(**settings), force) as continued:
        return continued


def test_a_kill_before_the_first_file_was_renamed_leaves_a_usable_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f".config.yaml.partial-{DEAD}").write_text("half")
    assert begin(folder, seed=1) is False
    assert sorted(p.name for p in folder.iterdir()) == ["plan.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f".y.partial-{DEAD}").write_text("half")
    refuse_existing(tmp_path / "other", force=False)
    with new_folder(tmp_path / "other") as partial:
        (partial / "x").write_text("x")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["x"]


def test_files_of_killed_writes_are_no_part_of_a_manifest(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"a")
    (tmp_path / f".manifest.json.partial-{DEAD}").write_text("half")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "b.bin").write_bytes(b"b")
    write_manifest(tmp_path, "cache", 1, {}, {}, skip=("checkpoints",))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest["files"]) == ["a.bin"]


def test_an_unfinished_folder_is_continued_by_the_same_plan_only(tmp_path):
    folder = tmp_path / "c"
    assert begin(folder, seed=1, loss={"alpha": 0.1}) is False
    assert begin(folder, seed=1, loss={"alpha": 0.1}) is True
    with pytest.raises(UsageError, match=r"unfinished cache with another loss\.alpha, seed\."):
        begin(folder, seed=2, loss={"alpha": 0.2})
    assert begin(folder, force=True, seed=2) is False
    write_json(folder / "manifest.json", {"kind": "cache"})
    (folder / "plan.json").unlink()
    with pytest.raises(UsageError, match="already holds a finished cache"):
        begin(folder, seed=2)


@pytest.mark.parametrize("force", [False, True])
def test_somebody_elses_folder_is_never_taken(tmp_path, force):
    (tmp_path / "plan.json").write_text('{"name": "mine"}')
    with pytest.raises(UsageError, match="something that is not a cache"):
        begin(tmp_path, force=force, seed=1)
    assert (tmp_path / "plan.json").read_text() == '{"name": "mine"}'


def test_what_force_replaced_comes_back_if_the_beginning_fails(tmp_path):
    folder = tmp_path / "c"
    begin(folder, seed=1)
    (folder / "shard.bin").write_bytes(b"hours of work")
    with pytest.raises(RuntimeError), claim(folder, plan(seed=2), force=True):
        (folder / "config.yaml").write_text("")
        raise RuntimeError
    assert (folder / "shard.bin").read_bytes() == b"hours of work"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(RuntimeError), claim(tmp_path / "new", plan(seed=2), force=False):
        (tmp_path / "new" / "config.yaml").write_text("")
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_a_second_command_is_refused_and_told_who_is_at_work(tmp_path):
    code = f"""
import sys
from pathlib import Path
from xinslm.folders import locked
with locked(Path({str(tmp_path / "run")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UsageError, match=f"run is in use by process {holder.pid}"),
        locked(tmp_path / "run"),
    ):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run"):
        pass
    assert not list(tmp_path.glob(".run.lock"))


def test_training_holds_its_folder(world, tmp_path):
    """Two runs on one folder would mix their metrics."""
    import training

    config, tried = world.distill(tmp_path / "run", max_steps=2), []

    def again(progress):
        if "loss" in progress.values and not tried:
            tried.append(1)
            with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
                training.run(config)

    training.run(config, again)
    assert tried


def test_a_folder_that_is_removed_while_it_is_written_is_no_success(tmp_path):
    def remove(partial):
        shutil.rmtree(partial)

    def remove_and_write_on(partial):
        remove(partial)
        write_json(partial / "manifest.json", {"kind": "dataset"})

    for act in (remove, remove_and_write_on):
        with pytest.raises(XinslmError, match="was removed while"), new_folder(tmp_path / "d") as p:
            (p / "tokens.bin").write_bytes(b"x")
            act(p)
        assert not list(tmp_path.iterdir())


def test_a_dataset_is_compared_with_its_hashes_once_a_process(world, tmp_path, monkeypatch):
    data = shutil.copytree(world.data, tmp_path / "data")
    hashed = []
    real = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path) or real(path))
    open_dataset(data)
    first = len(hashed)
    open_dataset(data)
    assert first == len(hashed) > 3
    tokens = bytearray((data / "train" / "tokens.bin").read_bytes())
    tokens[10] ^= 1
    (data / "train" / "tokens.bin").write_bytes(tokens)
    with pytest.raises(XinslmError, match=r"tokens\.bin is damaged.*xinslm prepare"):
        open_dataset(data)
