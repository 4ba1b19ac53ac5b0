"""Folders that are either whole or absent: temporary name, fsync, rename; and the manifest that
every folder carries.

A stage writes into `with new_folder(path) as folder:`. A crash, a full disk or a kill leaves only a
hidden `.NAME.partial-PID` beside the target, which the next run removes.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xinslm import __version__
from xinslm.errors import UsageError, XinslmError

MANIFEST = "manifest.json"


def refuse_existing(path: Path, force: bool) -> None:
    """Raise UsageError if `path` is a file or a folder that holds something and `force` is off."""
    if path.is_file():
        raise UsageError(
            f"{path} is a file; a folder is to be written there. Choose another --output-dir"
        )
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UsageError(
            f"{path} already holds something. Choose another --output-dir, or add "
            "--force to replace it"
        )


def refuse_foreign(path: Path) -> None:
    """Raise UsageError if `path` holds something that no stage made: --force replaces only what has
    a manifest.
    """
    if path.is_dir() and any(path.iterdir()):
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None
        if not isinstance(manifest, dict) or "kind" not in manifest:
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


@contextmanager
def new_folder(path: Path, force: bool = False, own: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends without an error, and
    vanishes otherwise.

    `force` replaces a folder that a stage made; with `own`, the caller vouches for whatever stands
    there.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    refuse_existing(path, force)
    if not own:
        refuse_foreign(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace_folder(partial, path)


def replace_folder(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`; a folder that stands there is moved aside first and then
    deleted.
    """
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_partials(path: Path) -> None:
    """Tidy what killed runs left beside `path`: half-written folders go, a folder moved aside comes
    back.

    What belongs to processes that still live is kept.
    """
    for kind in ("partial", "old"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"):
            pid = left.name.rpartition("-")[2]
            if pid.isdigit() and int(pid) != os.getpid() and _is_alive(int(pid)):
                continue
            if kind == "old" and not path.exists():
                os.rename(left, path)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary file name beside `path` that replaces `path` when the block ends without an
    error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with its line ends as they are, atomically."""
    with new_file(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; an XinslmError names the file and line of what is wrong with it."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise XinslmError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise XinslmError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); the file may be half-written"
        ) from None
    except UnicodeDecodeError:
        raise XinslmError(f"{path}: not a JSON file (it is not text)") from None


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    kind: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    skip: tuple[str, ...] = (),
    **content: Any,
) -> None:
    """Write `manifest.json`: what this folder is, what made it, from which inputs, and the files it
    must hold.

    `inputs` maps a role ('tokenizer', 'teacher') to the fingerprint of what was read; `content`
    holds what the readers of this kind of folder need. Sizes and hashes of all files below `folder`
    are added, but of those named in `skip`.
    """
    names = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, *skip))
    write_json(
        folder / MANIFEST,
        {
            "kind": kind,
            "version": version,
            "made_by": f"xinslm {__version__}",
            "config": dict(config),
            "inputs": dict(inputs),
            **content,
            "files": {
                p.relative_to(folder).as_posix(): {
                    "bytes": p.stat().st_size,
                    "sha256": sha256_file(p),
                }
                for p in names
            },
        },
    )


def read_manifest(
    folder: Path, kind: str, version: int, made_by: str, remedy: str | None = None
) -> dict[str, Any]:
    """Read and check a folder's manifest: kind, version, and that every file is there in full.

    `made_by` is the command that makes such a folder, for the message ('xinslm prepare'); `remedy`
    says what to do about a missing or damaged file, by default to make the folder anew.
    """
    remedy = remedy or f"make the folder anew with `{made_by}`"
    path = Path(folder) / MANIFEST
    if not path.is_file():
        where = "does not exist" if not Path(folder).exists() else f"has no {MANIFEST}"
        raise UsageError(f"{folder} is not a {kind} folder: it {where}. Make one with `{made_by}`")
    manifest: dict[str, Any] = read_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found == kind and not {"version", "files", "inputs", "config"} <= manifest.keys():
        raise XinslmError(f"{path} is incomplete. Make the folder anew with `{made_by}`")
    if found != kind:
        raise UsageError(
            f"{folder} is a {found or 'foreign'} folder, but a {kind} folder is needed. Make one "
            f"with `{made_by}`"
        )
    if manifest["version"] != version:
        raise XinslmError(
            f"{folder} has {kind} format version {manifest['version']}, this xinslm reads version "
            f"{version}. "
            f"Make it anew with `{made_by}`"
        )
    for name, facts in manifest["files"].items():
        file = Path(folder) / name
        if not file.is_file():
            raise XinslmError(
                f"{file} is missing; the manifest lists it. Copy it again, or {remedy}"
            )
        if file.stat().st_size != facts["bytes"]:
            raise XinslmError(
                f"{file} has {file.stat().st_size:,} bytes, the manifest says {facts['bytes']:,}: "
                "it is damaged or "
                f"half-copied. Copy it again, or {remedy}"
            )
    return manifest


def damaged_files(
    folder: Path, manifest: Mapping[str, Any], tell: Callable[[int], None] | None = None
) -> list[str]:
    """Names of files that are missing or do not have the bytes that the manifest tells of; hashes
    several at once.

    `tell` takes the number of bytes checked so far.
    """
    done = 0

    def is_damaged(name: str, facts: Mapping[str, Any]) -> bool:
        path = Path(folder) / name
        return not (
            path.is_file()
            and path.stat().st_size == facts["bytes"]
            and sha256_file(path) == facts["sha256"]
        )

    found = []
    files = manifest["files"]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        for (name, facts), damaged in zip(
            files.items(), pool.map(is_damaged, files, files.values()), strict=True
        ):
            done += facts["bytes"]
            if damaged:
                found.append(name)
            if tell is not None:
                tell(done)
    return found


def manifest_fingerprint(folder: Path) -> str:
    """Hash that names a folder's content: of its manifest, which holds the hash of every file."""
    return sha256_file(Path(folder) / MANIFEST)
