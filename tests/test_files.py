"""Folders that are whole or absent, and manifests that notice damage."""

import errno
import os
import subprocess
import sys

import pytest

from xinslm.errors import UsageError, XinslmError
from xinslm.files import new_file, read_json, read_manifest, write_manifest
from xinslm.folders import new_folder, refuse_inside, refuse_output_in, refuse_uncreatable


def make(folder, text="x"):
    with new_folder(folder) as partial:
        (partial / "a.txt").write_text(text)
        write_manifest(partial, "thing", 1, {"k": 1}, {"from": "abc"}, extra=5)


def test_folder_appears_whole(tmp_path):
    make(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", "thing", 1, "xinslm make")
    assert manifest["extra"] == 5 and manifest["inputs"] == {"from": "abc"}
    assert manifest["files"]["a.txt"]["bytes"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError()]
)
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "out") as partial:
        (partial / "a.txt").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_kept_without_force(tmp_path):
    make(tmp_path / "out")
    with pytest.raises(UsageError, match="already holds something"):
        make(tmp_path / "out", "y")
    assert (tmp_path / "out" / "a.txt").read_text() == "x"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", force=True):
        raise RuntimeError
    assert (tmp_path / "out" / "a.txt").read_text() == "x"
    with new_folder(tmp_path / "out", force=True) as partial:
        (partial / "b.txt").write_text("z")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        make(tmp_path / "file")


def test_force_leaves_what_no_stage_made(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with (
        pytest.raises(UsageError, match="no xinslm command made"),
        new_folder(tmp_path / "home", force=True),
    ):
        pass
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_what_a_kill_left_is_removed_by_the_next_run(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from xinslm.folders import new_folder
with new_folder(Path({str(tmp_path / "out")!r})) as partial:
    (partial / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert [p.name.startswith(".out.partial-") for p in tmp_path.iterdir()] == [True]
    make(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    make(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.old-999999999")
    with pytest.raises(UsageError, match="already holds something"):
        make(tmp_path / "out", "y")
    assert (tmp_path / "out" / "a.txt").read_text() == "x"


def test_an_input_is_never_replaced(tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    for given in (
        tmp_path / "out",
        tmp_path / "out" / "deep",
        str(tmp_path / "out" / ".." / "out"),
    ):
        with pytest.raises(UsageError, match="--force would delete"):
            refuse_inside(tmp_path / "out", [None, given])
    refuse_inside(tmp_path / "out" / "deep", [tmp_path / "out", tmp_path / "absent", "org/name"])


def test_an_output_is_outside_of_the_folders_that_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("")
    refused = [("in", "in"), ("in/x/y", "in"), ("in/../in/x", "in/"), ("a.txt", "a.txt")]
    for output, given in refused:
        with pytest.raises(UsageError, match=r"is the input|lies in"):
            refuse_output_in(tmp_path / output, ["org/name", str(tmp_path / given)])
    refuse_output_in(tmp_path / "out", [tmp_path / "in", tmp_path / "out" / "a", "org/name"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/proc/x", ""),
        ("/proc/x/y/z", ""),
        ("a.txt/x", "a.txt is a file"),
        ("n" * 300, "File name too long"),
        (f"deep/{'n' * 300}/x", "File name too long"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused(tmp_path, name, reason):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=f"cannot be written: .*{reason}"):
        refuse_uncreatable(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_trying_a_place_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "new/deep/er", "there", "there/new"):
        refuse_uncreatable(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError), new_file(path) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_manifest_refuses_what_does_not_fit(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UsageError, match="does not exist"):
        read_manifest(folder, "thing", 1, "xinslm make")
    make(folder)
    with pytest.raises(
        UsageError, match=r"is a thing folder, but a cache folder is needed.*xinslm cache"
    ):
        read_manifest(folder, "cache", 1, "xinslm cache")
    with pytest.raises(XinslmError, match="format version 1, this xinslm reads version 2"):
        read_manifest(folder, "thing", 2, "xinslm make")
    (folder / "a.txt").write_text("longer")
    with pytest.raises(XinslmError, match="damaged or half-copied"):
        read_manifest(folder, "thing", 1, "xinslm make")
    (folder / "a.txt").unlink()
    with pytest.raises(XinslmError, match="is missing"):
        read_manifest(folder, "thing", 1, "xinslm make")
    (folder / "manifest.json").write_text('{"kind": "thing",')
    with pytest.raises(XinslmError, match=r"manifest.json:1: not valid JSON"):
        read_manifest(folder, "thing", 1, "xinslm make")


def test_binary_json_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(XinslmError, match="not a JSON file"):
        read_json(tmp_path / "a.json")
