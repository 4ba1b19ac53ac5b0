"""Put a GGUF file where LM Studio looks for models: MODELS/PUBLISHER/NAME/FILE.gguf.

LM Studio's own folder is ~/.lmstudio, ~/.cache/lm-studio in old installations, or what
~/.lmstudio-home-pointer names; its settings.json may name another folder for models. The file is
linked, so it takes no space twice; on another disk it is copied.
"""

import json
import os
import re
import shutil
from pathlib import Path

from xinslm.errors import UsageError
from xinslm.files import new_file
from xinslm.folders import refuse_uncreatable

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def models_folder(home: Path) -> Path:
    """The folder with LM Studio's models, of the user whose home folder is `home`."""
    places = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    pointer = home / ".lmstudio-home-pointer"
    if pointer.is_file() and (named := pointer.read_text("utf-8", "replace").strip()):
        places.insert(0, Path(named))
    own = next((place for place in places if place.is_dir()), places[-2])
    try:
        settings = json.loads((own / "settings.json").read_bytes())
        named = settings["downloadsFolder"]
    except (OSError, ValueError, KeyError, TypeError):
        return own / "models"
    return Path(named) if isinstance(named, str) and named else own / "models"


def destination(file: Path, name: str, models: Path | None) -> Path:
    """Where `file` goes as `name`, PUBLISHER/NAME; UsageError if it cannot, or is there."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"--lmstudio {name}: give PUBLISHER/NAME, such as me/student")
    if file.suffix != ".gguf":
        raise UsageError(f"LM Studio reads files that end in .gguf, and {file.name} does not")
    path = (models or models_folder(Path.home())) / name / file.name
    if path.exists():
        raise UsageError(
            f"LM Studio already has {path}. Remove it there first, or give another --lmstudio name"
        )
    refuse_uncreatable(path)
    return path


def place(file: Path, path: Path) -> None:
    """Link or copy `file` to `path`, which does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, path)
    except FileExistsError:
        raise UsageError(f"LM Studio already has {path}. Remove it there first") from None
    except OSError:  # another disk, or one without links
        with new_file(path) as partial:
            shutil.copyfile(file, partial)
