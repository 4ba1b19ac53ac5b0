"""Output folders: atomic ones, and ones that a command fills step by step and continues.

`new_folder` writes under a temporary name and renames: a crash, a full disk or a kill leaves only a
hidden `.NAME.partial-PID`, which the next run removes. `claim` begins or continues a folder that is
filled step by step (a cache, a training run): a file in it, the plan, says what it is to become,
and the same command continues it. `locked` keeps a second command away.
"""

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.files import MANIFEST, read_json, sync_folder, sync_tree, write_json

_PARTIAL = re.compile(r"^\..*\.(partial|old)-\d+$")


def refuse_existing(path: Path, force: bool) -> None:
    """Raise UsageError if `path` is a file, or a folder that is not empty and `force` is off."""
    if path.is_file():
        raise UsageError(
            f"{path} is a file; a folder is to be written there. Choose another --output-dir"
        )
    if path.is_dir() and not is_empty(path) and not force:
        raise UsageError(
            f"{path} already holds something. Choose another --output-dir, or add "
            "--force to replace it"
        )


def refuse_foreign(path: Path) -> None:
    """Raise UsageError if `path` holds something without a manifest, which --force must not
    replace.
    """
    if path.is_dir() and not is_empty(path) and manifest_kind(path) is None:
        raise UsageError(
            f"{path} holds something that no xinslm command made; --force leaves it. Choose "
            "another --output-dir"
        )


def refuse_inside(output: Path, inputs: Iterable[Path | str | None]) -> None:
    """Raise UsageError if replacing `output` would delete an input: one that it is, or that lies in
    it.
    """
    target = Path(output).resolve()
    for given in inputs:
        if given is not None and Path(given).exists():
            source = Path(given).resolve()
            if source == target or target in source.parents:
                raise UsageError(
                    f"--force would delete {given}, which is read: it lies in {output}. Choose "
                    "another output"
                )


def refuse_output_in(output: Path, inputs: Iterable[Path | str]) -> None:
    """Raise UsageError if `output` is one of `inputs`, or lies in a folder that is read with
    everything in it.
    """
    target = Path(output).resolve()
    for given in inputs:
        source = Path(given).expanduser().resolve()
        if source == target and source.exists():
            raise UsageError(f"{output} is the input {given}. Choose another --output-dir")
        if source in target.parents and source.is_dir():
            raise UsageError(
                f"{output} lies in {given}, which is read with everything in it: the next run "
                "would read what this one writes. Choose an --output-dir outside of it"
            )


def refuse_uncreatable(path: Path) -> None:
    """Raise UsageError if `path`, a folder or a file, can be neither made nor written to.

    What is tried leaves nothing.
    """
    target = Path(path).absolute()
    try:
        existing = next(p for p in (target, *target.parents) if p.exists())
        if existing == target:
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, "no permission to write there")
            return
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is a file")
        missing = target.relative_to(existing)
        # named as `remove_partials` expects it
        trial = existing / f".{missing.parts[0]}.partial-{os.getpid()}"
        try:
            trial.joinpath(*missing.parts[1:]).mkdir(parents=True)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}. Choose another place for the output"
        ) from None


def manifest_kind(folder: Path) -> str | None:
    """The kind of folder that a manifest names; None if there is no such manifest."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    return manifest.get("kind") if isinstance(manifest, dict) else None


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but temporary files of killed runs."""
    return all(_PARTIAL.match(entry.name) for entry in folder.iterdir())


@contextmanager
def new_folder(path: Path, force: bool = False, own: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends without an error, and is
    deleted otherwise.

    `force` replaces a folder that a stage made; with `own`, whatever is there.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    refuse_existing(path, force)
    if not own:
        refuse_foreign(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)  # open, so that its inode is not used again
    try:
        yield partial
        if not partial.is_dir() or not os.path.samestat(partial.stat(), os.fstat(handle)):
            raise XinslmError(
                f"{partial} was removed while {path} was being written there; nothing was written. "
                "Run the command again"
            )
        sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(handle)
    replace_folder(partial, path)


def replace_folder(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`; an existing one is moved aside first and then deleted."""
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_partials(path: Path) -> None:
    """Remove what killed runs left next to `path` and in it; a folder that was moved aside comes
    back.

    What belongs to live processes is kept.
    """
    name = glob.escape(path.name)
    lefts = [*path.parent.glob(f".{name}.partial-*"), *path.parent.glob(f".{name}.old-*")]
    lefts += [entry for entry in path.glob(".*") if _PARTIAL.match(entry.name)]
    for left in lefts:
        pid = left.name.rpartition("-")[2]
        if not pid.isdigit() or (int(pid) != os.getpid() and _is_alive(int(pid))):
            continue
        if ".old-" in left.name and left.parent == path.parent and not path.exists():
            os.rename(left, path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, by a lock on `.NAME.lock` next to it.

    Raises UsageError naming the process that holds it. A killed process holds nothing.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"{folder} is in use by {holder}. Wait until it has ended, or choose another "
                "--output-dir"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Plan:
    """What a folder that is filled step by step is to become."""

    note: str
    """Name of the file in the folder that holds `content`."""
    content: Mapping[str, Any]
    """What the result follows from; a continued run must have the same."""
    what: str
    """For messages: 'cache', 'run'."""
    kind: str | None = None
    """Manifest kind of a finished folder; None if the note stays in it."""
    reads: tuple[Path | str | None, ...] = ()
    """Inputs, which --force must not delete."""
    also: tuple[str, ...] = ()
    """Other files that are written when the folder is begun."""

    def found(self, folder: Path) -> dict[str, Any] | None:
        """The plan that a folder of this kind holds, unfinished; None if there is none."""
        if not (folder / self.note).is_file():
            return None
        note = read_json(folder / self.note)
        ours = isinstance(note, dict) and self.content.keys() <= note.keys()
        return {key: note[key] for key in self.content} if ours else None

    def is_finished(self, folder: Path) -> bool:
        """Whether a folder is a finished one of this kind."""
        return self.kind is not None and manifest_kind(folder) == self.kind


@contextmanager
def claim(
    folder: Path, plan: Plan, force: bool, may_change: Callable[[], bool] | None = None
) -> Iterator[bool]:
    """Begin or continue `folder`; gives whether it is continued.

    An empty folder is begun and an unfinished one of the same plan continued. `force` replaces a
    folder of the same kind, which comes back if the block raises. Anything else raises UsageError.
    `may_change` is asked if an unfinished folder has another plan: true if nothing depends on it.
    """
    folder = Path(folder).resolve()
    remove_partials(folder)
    note, aside, continued = folder / plan.note, None, False
    found, finished = plan.found(folder), plan.is_finished(folder)
    if force and (found is not None or finished):
        refuse_inside(folder, plan.reads)
        aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        os.rename(folder, aside)
    elif found is not None:
        changed = differing_keys(_plain(plan.content), found)
        continued = not changed
        if changed and not (may_change is not None and may_change()):
            named = ", ".join(key.partition(".")[2] or key for key in changed)
            raise UsageError(
                f"{folder} holds an unfinished {plan.what} with another {named}. Run "
                "the command that began it, choose another --output-dir, or add --force to replace "
                "it"
            )
    elif finished:
        raise UsageError(
            f"{folder} already holds a finished {plan.what}. Choose another --output-dir, or add "
            "--force to replace it"
        )
    elif folder.is_file() or (folder.is_dir() and not is_empty(folder)):
        leaves = "; --force leaves it" if force else ""
        raise UsageError(
            f"{folder} already holds something that is not a {plan.what}{leaves}. Choose another "
            "--output-dir"
        )
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not continued:
            write_json(note, plan.content)
        yield continued
    except BaseException:
        if aside is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
        elif not continued and {p.name for p in folder.iterdir()} <= {plan.note, *plan.also}:
            for name in (plan.note, *plan.also):
                (folder / name).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of keys whose values differ, nested ones with dots."""
    keys: list[str] = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += [f"{key}.{inner}" for inner in differing_keys(a, b)]
        elif a != b:
            keys.append(key)
    return keys


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Content as it reads back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain
