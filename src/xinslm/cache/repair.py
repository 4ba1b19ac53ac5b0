"""Reopening a finished cache with damaged or missing files, so that only those are rebuilt."""

from pathlib import Path
from typing import Any

from xinslm.cache.folder import KIND, PLAN, VERSION
from xinslm.errors import UsageError
from xinslm.files import MANIFEST, damaged_files, read_json, write_json
from xinslm.folders import differing_keys


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
            f"{folder} was made by another version of xinslm; replace it with --force instead of "
            "--repair"
        )
    groups = ("format", "settings", "inputs")
    if other := differing_keys(*({name: x.get(name) for name in groups} for x in (manifest, plan))):
        named = ", ".join(key.rpartition(".")[2] for key in other)
        raise UsageError(
            f"{folder} was made with another {named}: its files would not belong together. Repair "
            "it with the command that made it, or replace it with --force"
        )
    damaged = damaged_files(folder, manifest)
    if not damaged:
        raise UsageError(f"{folder} is intact: there is nothing to repair")
    # before the folder counts as unfinished: its files are trusted then
    shards = {str(Path(name).parent / Path(name).name.partition(".")[0]) for name in damaged}
    for shard in shards:  # files of a shard belong together
        for file in folder.glob(f"{shard}.*"):
            file.unlink()
    write_json(folder / PLAN, plan)
    (folder / MANIFEST).unlink()
