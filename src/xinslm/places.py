"""Find what a name refers to: a file or folder, the best checkpoint of a run folder, or a
repository on the Hugging Face Hub, which is downloaded.
"""

import re
from collections.abc import Callable
from pathlib import Path

from xinslm.errors import UsageError

_PARTS = ("", "checkpoints/best", "checkpoints/last")


def find(
    name: Path | str,
    what: str,
    holds: Callable[[Path], bool],
    patterns: list[str],
    revision: str | None = None,
) -> Path:
    """Return the place of a `what` ("model"); `holds` says whether a path contains one.

    A path that exists is returned even if it holds none, because its reader names what is missing.
    `patterns` are the files to download. UsageError if neither this machine nor the Hub has it.
    """
    path = Path(name)
    for part in _PARTS:
        if holds(path / part):
            return path / part
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise UsageError(
            f"there is no {what} at {name}: give a {what} folder, a run folder, a GGUF file or a "
            "Hub name with its owner, OWNER/NAME, such as openai-community/gpt2"
        )
    import huggingface_hub

    try:
        found = Path(
            huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=patterns)
        )
    # the hub client raises a dozen kinds: offline, no such repository, gated
    except Exception as error:
        at = "" if revision is None else f" at revision {revision}"
        raise UsageError(
            f"{name} does not exist here, and the Hub returned no {what} of that name{at}: {error}"
        ) from error
    if not holds(found):
        raise UsageError(
            f"{name} does not exist here, and the Hub repository of that name has no {what}"
        )
    return found
