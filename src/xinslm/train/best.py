"""The best model at the top of a run folder, where Hugging Face users look for a model.

    AutoModelForCausalLM.from_pretrained("runs/student")

The files are hard links to those of `checkpoints/best`, copies on a file system without links. So
they take no space, stay complete when the folder is copied or uploaded, and need no `checkpoints/`.
Weights alone differ between checkpoints, and one file is replaced atomically.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from xinslm.files import new_file, sync_folder


def publish(checkpoint: Path, run: Path, skip: Iterable[str]) -> None:
    """Put the files of a checkpoint at the top of `run`, but those named in `skip`.

    `config.json` comes last, because it is what makes a folder a model folder.
    """
    names = sorted({path.name for path in checkpoint.iterdir()} - set(skip))
    for name in sorted(names, key="config.json".__eq__):
        link_or_copy(checkpoint / name, run / name)
    sync_folder(run)


def link_or_copy(source: Path, target: Path) -> None:
    """Replace `target` atomically by a hard link to `source`, or by a copy."""
    if target.exists() and target.samefile(source):  # where a rename would do nothing
        return
    fresh = target.with_name(f".{target.name}.link")
    fresh.unlink(missing_ok=True)
    try:
        os.link(source, fresh)
        os.replace(fresh, target)
    except OSError:  # the file system has no hard links
        fresh.unlink(missing_ok=True)
        with new_file(target) as partial:
            shutil.copyfile(source, partial)
