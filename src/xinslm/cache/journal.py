"""An append-only file of finished work, one JSON object per line; a kill loses only unfinished
work.

`ShardJournal` keeps the finished steps of a shard: a batch, a document. Each step's result depends
only on the shard, so a continued shard is byte-identical to an uninterrupted one.
"""

import base64
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAVE_SECONDS = 20.0
"""Most seconds between a finished step and its writing; short shards are never written."""


class Journal:
    """Reads the entries of an earlier run, drops an incomplete last line, appends after it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 closed by __exit__
        self._file.seek(0)
        complete = 0
        self._entries: list[dict[str, Any]] = []
        for line in self._file:
            entry = _parse(line)
            if entry is None:
                break  # work after a damaged line is done again
            self._entries.append(entry)
            complete += len(line)
        self._file.truncate(complete)
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Entries that the file held when it was opened, in order."""
        return iter(self._entries)

    def append(self, *entries: dict[str, Any]) -> None:
        """Write entries to the disk."""
        lines = [json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())


class ShardJournal:
    """Results of the finished steps of one shard, which survive an interruption.

    A step fills places (a slice or indices) of arrays; `restore` fills them from the file.
    """

    def __init__(self, path: Path | None, save_seconds: float | None = None) -> None:
        """Without a path nothing is kept; `save_seconds` is `SAVE_SECONDS` by default."""
        self._path = path
        self._journal = None if path is None or not path.is_file() else Journal(path)
        self._pending: list[dict[str, Any]] = []
        self._save_seconds = SAVE_SECONDS if save_seconds is None else save_seconds
        self._saved = time.monotonic()
        self._found = {entry.get("step"): entry for entry in self._journal or ()}

    def __enter__(self) -> "ShardJournal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._save()
        if self._journal is not None:
            self._journal.__exit__(kind)

    def restore(self, step: int | str, places: Any, arrays: Mapping[str, np.ndarray]) -> bool:
        """Fill `places` of the arrays as an earlier run did; False if its entry is not intact."""
        entry, results = self._found.get(step, {}), {}
        for name, array in arrays.items():
            try:
                data = zlib.decompress(base64.b64decode(str(entry[name]), validate=True))
            except (KeyError, ValueError, zlib.error):
                return False
            if len(data) != array[places].nbytes:
                return False
            results[name] = np.frombuffer(data, array.dtype)
        for name, result in results.items():
            arrays[name][places] = result
        return True

    def keep(self, step: int | str, places: Any, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep `places` of the arrays as the result of a step."""
        results = {}
        for name, array in arrays.items():
            data = zlib.compress(array[places].tobytes(), level=1)
            results[name] = base64.b64encode(data).decode()
        self._pending.append({"step": step, **results})
        if time.monotonic() - self._saved >= self._save_seconds:
            self._save()

    def _save(self) -> None:
        if self._path is not None and self._pending:
            self._journal = self._journal or Journal(self._path)
            self._journal.append(*self._pending)
        self._pending, self._saved = [], time.monotonic()


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
