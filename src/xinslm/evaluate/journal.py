"""What a model has answered so far, in a file, so that a stopped benchmark goes on.

A line of JSON for each request: its key, and the answer. A key is a hash of everything that the
answer depends on, the model's weights included, so an entry of another model or of changed settings
is not found and does no harm. A last line that was half-written is dropped.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xinslm.errors import Interrupted, UsageError, XinslmError

SECONDS = 5.0
"""The most that a kill loses."""
_HEADER = ["xinslm benchmark", 1]


class Journal:
    """Answers by key, in memory and in a file that grows."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier run left in `path`; UsageError if that is another kind of file."""
        self.path, self.known, self.reused = path, dict[str, Any](), 0
        self._lines: list[str] = []
        self._flushed = time.monotonic()
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            self._lines.append(json.dumps(_HEADER))
            return
        if _parsed(lines[0]) != _HEADER:
            raise UsageError(
                f"{path} is where an unfinished benchmark keeps its answers, but it is another "
                "kind of file. Move it away"
            )
        if lines[-1]:  # half a line: what follows begins a new one
            self._lines.append("")
        for line in lines[1:]:
            entry = _parsed(line)
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
                self.known[entry[0]] = entry[1]

    @staticmethod
    def key(*parts: bytes) -> str:
        """Key of a request; the order and the borders of the parts count."""
        digest = hashlib.blake2b(digest_size=15)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def get(self, key: str) -> Any:
        """The answer, or None."""
        found = self.known.get(key)
        self.reused += found is not None
        return found

    def add(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Keep answers, which must not be None; they are in the file some seconds later."""
        for key, answer in entries:
            self.known[key] = answer
            self._lines.append(json.dumps([key, answer]))
        if time.monotonic() - self._flushed >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is kept; XinslmError if that fails."""
        if not self._lines:
            return
        try:
            with open(self.path, "ab") as file:
                file.write("".join(f"{line}\n" for line in self._lines).encode())
        except OSError as error:
            raise XinslmError(
                f"{self.path}: {error.strerror or error}. The answers of an unfinished benchmark "
                "are kept there; what it already holds is used when the command is run again"
            ) from None
        self._lines, self._flushed = [], time.monotonic()

    def remove(self) -> None:
        """Delete the file."""
        self._lines = []
        self.path.unlink(missing_ok=True)


@contextmanager
def kept(path: Path | None) -> Iterator[Journal | None]:
    """A journal in `path`, for as long as answers come; it stays until it is removed.

    Ctrl-C becomes `Interrupted`, which says where the answers are.
    """
    if path is None:
        yield None
        return
    journal = Journal(path)
    try:
        yield journal
    except KeyboardInterrupt:
        journal.flush()
        raise Interrupted(
            f"stopped; {path} keeps {len(journal.known):,} answers, and the same command goes on "
            "from them"
        ) from None
    finally:
        journal.flush()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
