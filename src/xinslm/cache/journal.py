"""An append-only file of work that is done: a whole line each, so that a kill costs what was under
way and no more.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """`with Journal(path) as journal:` reads what an earlier run left, drops half a line at its
    end, goes on behind it.

    Each entry is a JSON object.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 closed by __exit__
        self._file.seek(0)
        whole = 0
        self._entries: list[dict[str, Any]] = []
        for line in self._file:
            entry = _parse(line)
            if entry is None:
                break  # what stands behind a damaged line is done again
            self._entries.append(entry)
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Entries that were there when it was opened, in their order."""
        return iter(self._entries)

    def append(self, *entries: dict[str, Any]) -> None:
        """Write entries to the disk."""
        self._file.write(
            b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries)
        )
        self._file.flush()
        os.fsync(self._file.fileno())


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
