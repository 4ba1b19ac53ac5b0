"""The folder of a quantization that can be stopped, `.NAME.unfinished` next to the output NAME.

It has the finished layers and a plan: all that the codes follow from. A run with another plan
replaces it only with --force. It has no config.json, so no command takes it for a model.

    with stopped_run(Path("model-4bit"), plan, force=False, on_progress=print) as layers:
        ...
"""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xinslm.errors import Interrupted, UsageError, XinslmError
from xinslm.files import read_json, write_json
from xinslm.folders import differing_keys, locked
from xinslm.progress import Listener, Progress
from xinslm.quantize.finished_layers import FinishedLayers

_PLAN = "plan.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def stopped_run(
    output: Path, plan: Mapping[str, Any], force: bool, on_progress: Listener
) -> Iterator[FinishedLayers]:
    """Begin the folder of a quantization into `output`, or continue that of a stopped one.

    `plan` is all that the codes follow from. A folder with another one is a UsageError that names
    what differs; with `force` it is begun anew. What is finished stays if the block raises, and the
    message says so: after a kill, Ctrl-C (Interrupted), a full disk or a refusal (XinslmError).
    """
    output = Path(output).resolve()
    folder = _folder(output)
    with locked(output):
        is_continued = _is_continued(folder, plan, force, on_progress)
        layers, is_done = FinishedLayers(folder), False
        try:
            with explained_full_disk(output):
                if not is_continued:
                    if folder.exists():
                        shutil.rmtree(folder)
                    folder.mkdir(parents=True)
                    write_json(folder / _PLAN, plan)
                yield layers
            is_done = True
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {_how_to_go_on(layers)}") from None
        except XinslmError as error:
            if not layers.remains():
                raise
            kinds = (UsageError, Interrupted)
            kind = next((kind for kind in kinds if isinstance(error, kind)), XinslmError)
            command = "the corrected" if kind is UsageError else "the same"
            raise kind(f"{error}; {_how_to_go_on(layers, command)}") from error
        finally:
            layers.remove_scratch()
            if is_done or not layers.remains():
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unstoppable_run(output: Path, plan: Mapping[str, Any], force: bool) -> Iterator[None]:
    """Lock `output` for a quantization that begins anew each time.

    A stopped run of other kind is a UsageError that names what of `plan` differs; with `force` its
    folder is deleted at the end. So is one whose plan is damaged: nothing says what its layers
    follow from.
    """
    output = Path(output).resolve()
    with locked(output), explained_full_disk(output):
        _is_continued(_folder(output), plan, force)
        yield
        shutil.rmtree(_folder(output), ignore_errors=True)


def _folder(output: Path) -> Path:
    return output.parent / f".{output.name}.unfinished"


def _is_continued(
    folder: Path, plan: Mapping[str, Any], force: bool, on_progress: Listener | None = None
) -> bool:
    """Whether `folder` holds a stopped run of this plan. UsageError if it is worth keeping, has
    another plan and `force` is off; with it, a note says why the run starts over.
    """
    if not folder.is_dir():
        return False
    try:
        found = read_json(folder / _PLAN)
    except XinslmError:
        found = None
    is_plan = isinstance(found, dict) and bool(found.keys() & plan.keys())
    changed = _changed(plan, found) if is_plan else []
    if is_plan and not changed:
        return True
    remains = FinishedLayers(folder).remains()
    if not remains:
        return False
    reason = f"another {', '.join(changed)}" if is_plan else "a damaged plan"
    if is_plan and not force:
        raise UsageError(
            f"{remains} in {folder}, of a stopped run with {reason}. Run the command that began "
            "it, choose another --output-dir, or add --force to delete that and start over"
        )
    if on_progress is not None:
        note = f"starting over: the stopped run has {reason}"
        on_progress(Progress("quantize", note=note))
    return False


def _changed(plan: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names of what differs in a stopped run, with its value if that says something."""
    keys = differing_keys(plan, {key: found.get(key) for key in plan})
    named = []
    for key in keys:
        value = found.get(key)
        is_telling = isinstance(value, int) or key in ("method", "program")
        name = (key.partition(".")[2] or key).replace("_", " ")
        named.append(f"{name} ({value})" if is_telling else name)
    return named


def _how_to_go_on(layers: FinishedLayers, command: str = "the same") -> str:
    """What a stopped run has left, and how to go on."""
    remains = layers.remains()
    if not remains:
        return "no layer was finished"
    return (
        f"{remains} in {layers.folder}, and {command} command continues from there (delete the "
        "folder if you do not want that)"
    )


class DiskFullError(XinslmError):
    """No space is left where the output is written."""


@contextmanager
def explained_full_disk(output: Path) -> Iterator[None]:
    """Raise DiskFullError, which names the folder, instead of an OSError that does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"no space is left on the disk of {output}, so it was not written: free some, or "
            "choose another --output-dir"
        ) from None
