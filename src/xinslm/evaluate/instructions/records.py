"""Reads the lines of a JSON Lines file as objects, with the line for messages."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError
from xinslm.evaluate.instructions.arguments import nearest


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for every line that is not blank; UsageError if there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    found = False
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            record = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            raise UsageError(f"{where}: byte {error.start} of the line is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deep")
            raise UsageError(f"{where}: not valid JSON ({reason})") from None
        if not text:
            continue
        if not isinstance(record, dict):
            raise UsageError(f"{where}: a line must be an object in braces, one for each item")
        found = True
        yield where, record
    if not found:
        raise UsageError(f"{path}: there are no items")


def require_keys(record: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse a key that would be ignored."""
    for key in record:
        if key not in known:
            raise UsageError(
                f"{where}: unknown key {key!r}.{nearest(key, list(known))} Known keys: "
                f"{', '.join(known)}"
            )


def require_text(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return text that is not blank."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: {key!r} must be text that is not blank, but is {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{where}: {key!r} has half a surrogate pair; it is not valid Unicode text"
        ) from None
    return value
