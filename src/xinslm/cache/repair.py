"""Reopening a finished cache with damaged or missing files, so that only those are rebuilt."""

from pathlib import Path
from typing import Any

from xinslm.cache.entries import KIND, PLAN, VERSION
from xinslm.errors import UsageError
from xinslm.files import MANIFEST, damaged_files, read_json, write_json


def differing(found: dict[str, Any], plan: dict[str, Any], groups: tuple[str, ...]) -> list[str]:
    """Keys whose values in `found` differ from the plan's, in the given groups."""
    return [
        key
        for group in groups
        for key in plan[group]
        if found.get(group, {}).get(key) != plan[group][key]
    ]


def reopen(folder: Path, plan: dict[str, Any]) -> None:
    """Delete the damaged files of a finished cache and make it an unfinished one of the same plan.

    Raises UsageError if there is no finished cache, another plan made it, or nothing is damaged.
    """
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UsageError(
            f"{folder} is not a finished cache: there is nothing to repair. Leave --repair out"
        )
    if manifest.get("version") != VERSION or "settings" not in manifest:
        raise UsageError(
            f"{folder} was made by another version of xinslm; replace it with "
            "--force instead of --repair"
        )
    if other := differing(manifest, plan, ("format", "settings", "inputs")):
        raise UsageError(
            f"{folder} was made with another {', '.join(other)}: its files would not belong "
            "together. Repair it with "
            f"the command that made it, or replace it with --force"
        )
    damaged = damaged_files(folder, manifest)
    if not damaged:
        raise UsageError(f"{folder} is intact: there is nothing to repair")
    # before the folder counts as unfinished: its files are trusted then
    for name in damaged:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / PLAN, plan)
    (folder / MANIFEST).unlink()
