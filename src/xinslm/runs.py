"""The tables of a run folder that several commands add to: evaluation.json, benchmark.json,
samples.json, files.json.

A row has a name, and a text that it is about: the data of an evaluation, the prompt of a sample.
Writing a row with the same name and text again replaces it, so that a command can be repeated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from xinslm.errors import UsageError, XinslmError
from xinslm.files import read_json, write_json

Table = Literal["evaluation.json", "benchmark.json", "samples.json", "files.json"]


def require_run(folder: Path) -> None:
    """Raise UsageError unless `folder` is a run folder; called before the work whose row it is to
    hold.
    """
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        what = "has neither config.yaml nor metrics.jsonl" if folder.is_dir() else "does not exist"
        raise UsageError(
            f"--run {folder} is not a run folder: it {what}. Give what `xinslm distill` or "
            "pretrain wrote"
        )


def read_rows(folder: Path, table: Table) -> list[dict[str, Any]]:
    """Read a table's rows; none if there is no such file yet."""
    path = folder / table
    if not path.is_file():
        return []
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and "name" in row for row in rows
    ):
        raise XinslmError(
            f'{path}: must hold {{"rows": [{{"name": ...}}, ...]}}; delete it and run the '
            "commands again"
        )
    return rows


def row_name(model: Path, activations: str) -> str:
    """A row's name if none is given; one with int8 activations does not replace one without."""
    return model.name + (", int8 activations" if activations == "int8" else "")


def add_row(folder: Path, table: Table, row: Mapping[str, Any]) -> None:
    """Put a row into a table, in the place of the one with the same name and text; atomic."""
    rows = read_rows(folder, table)
    keys = [_key(old) for old in rows]
    if _key(row) in keys:
        rows[keys.index(_key(row))] = dict(row)
    else:
        rows.append(dict(row))
    write_json(folder / table, {"rows": rows})


def add_file(
    run: Path | None, path: Path, size: int, bits_per_weight: float, name: str = ""
) -> None:
    """List a file or folder of `size` bytes in a run's files.json; nothing without a run."""
    if run is not None:
        row = {"name": name or path.name, "path": str(path), "bytes": size}
        add_row(run, "files.json", row | {"bits_per_weight": bits_per_weight})


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["name"], row.get("data"), row.get("prompt")
