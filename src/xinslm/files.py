"""Atomic files, hashes, and the manifest that every folder carries.

Files are written under a temporary name, flushed and renamed. A folder's files are compared with
the hashes of its manifest at their first use in a process.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xinslm import __version__
from xinslm.errors import UsageError, XinslmError

MANIFEST = "manifest.json"
_PARTIAL = re.compile(r"^\..*\.partial-\d+$")


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
    """Give a temporary file name next to `path` that replaces `path` when the block ends without an
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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise XinslmError(f"{path}: JSON that cannot be read ({error})") from None


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and time of change of a file, which tell that it was replaced; None if it is
    missing.
    """
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


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
    are added, except those in files or folders named in `skip`.
    """
    skipped = (MANIFEST, *skip)
    names = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file()
        and not _PARTIAL.match(p.name)
        and not any(part in skipped for part in p.relative_to(folder).parts)
    )
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
    folder: Path,
    kind: str,
    version: int,
    made_by: str,
    remedy: str | None = None,
    check_hashes: bool = True,
) -> dict[str, Any]:
    """Read and check a folder's manifest: kind, version, size and hash of every file.

    `made_by` is the command that makes such a folder, for the message ('xinslm prepare'); `remedy`
    says what to do about a missing or damaged file, by default to make the folder again.
    """
    remedy = remedy or f"make the folder again with `{made_by}`"
    path = Path(folder) / MANIFEST
    if not path.is_file():
        where = "does not exist" if not Path(folder).exists() else f"has no {MANIFEST}"
        raise UsageError(f"{folder} is not a {kind} folder: it {where}. Make one with `{made_by}`")
    manifest: dict[str, Any] = read_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found == kind and not {"version", "files", "inputs", "config"} <= manifest.keys():
        raise XinslmError(f"{path} is incomplete. Make the folder again with `{made_by}`")
    if found != kind:
        raise UsageError(
            f"{folder} is a {found or 'foreign'} folder, but a {kind} folder is needed. Make one "
            f"with `{made_by}`"
        )
    if manifest["version"] != version:
        raise XinslmError(
            f"{folder} has {kind} format version {manifest['version']}, this xinslm reads version "
            f"{version}. Make it again with `{made_by}`"
        )
    if not _lists_files(manifest["files"]):
        raise XinslmError(f"{path}: 'files' is damaged. Copy it again, or {remedy}")
    for name, facts in manifest["files"].items():
        file = Path(folder) / name
        if not file.is_file():
            raise XinslmError(
                f"{file} is missing; the manifest lists it. Copy it again, or {remedy}"
            )
        if file.stat().st_size != facts["bytes"]:
            raise XinslmError(
                f"{file} has {file.stat().st_size:,} bytes, the manifest says {facts['bytes']:,}: "
                f"it is damaged or half-copied. Copy it again, or {remedy}"
            )
    if check_hashes and (damaged := damaged_files(folder, manifest)):
        raise XinslmError(
            f"{Path(folder) / damaged[0]} is damaged: its content does not have the hash in the "
            f"manifest. Copy it again, or {remedy}"
        )
    return manifest


def _lists_files(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(facts, dict)
        and isinstance(facts.get("bytes"), int)
        and isinstance(facts.get("sha256"), str)
        for facts in files.values()
    )


_sound: set[tuple[str, str, int, int, int]] = set()
"""Files whose hash was right: path, hash, inode, size and time of change; each is read once."""


def _has_hash(path: Path, sha256: str) -> bool:
    facts = path.stat()
    key = (str(path.resolve()), sha256, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if key not in _sound and sha256_file(path) == sha256:
        _sound.add(key)
    return key in _sound


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
            and _has_hash(path, facts["sha256"])
        )

    found = []
    files = manifest["files"]
    from concurrent.futures import ThreadPoolExecutor  # slow to import

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
