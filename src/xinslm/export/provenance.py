"""What the files of a model say about where it comes from: its licence, its base model, how it was
made, what was measured.

Only records are read: manifests, run.json, the tables of a run folder, the front matter of a
README.md, the keys of a GGUF file. What they do not say stays unknown.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from xinslm.errors import XinslmError
from xinslm.files import MANIFEST, read_json
from xinslm.gguf_file import GgufFile, is_gguf
from xinslm.model.files import open_model
from xinslm.model.source import CONFIG
from xinslm.runs import read_rows

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LINKS = ("model", "init_from", "student")
"""Settings that name the model that a step made another of; the first that is there is followed. A
teacher is one only for `prune`, which cuts the student out of it.
"""
_MAX_STEPS = 12


@dataclass(frozen=True)
class Step:
    """A command that made one of the models between the base model and this one."""

    command: str
    """Such as 'quantize'; the kind of folder if the record has no command."""
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Fingerprints of what was read, by role."""
    facts: Mapping[str, Any]
    """The rest of the record."""


@dataclass(frozen=True)
class Provenance:
    """The history of a model, the last step first."""

    license: str | None = None
    base_model: str | None = None
    """The Hub name that the first step read."""
    steps: tuple[Step, ...] = ()
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Rows of evaluation.json."""
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    """Rows of benchmark.json."""


def trace(model: Path, run: Path | None = None) -> Provenance:
    """Follow the records from a model folder or file, and read the tables of its run folder.

    A recorded path is followed if the model there has the recorded fingerprint.
    """
    steps: list[Step] = []
    license_ = base = None
    name: str | None = str(model)
    run = run if run is not None else _run_of(Path(model))
    while name is not None and (path := Path(name)).exists() and len(steps) < _MAX_STEPS:
        told = _front_matter(path)
        license_ = license_ or _text(told.get("license"))
        base = base or _hub_name(told.get("base_model"))
        name = None
        if (step := _step(path)) is not None:
            steps.append(step)
            name = _read_by(step)
    if name is not None and _is_downloaded(name):
        base = base or name
    return Provenance(
        license_,
        base,
        tuple(steps),
        [] if run is None else read_rows(run, "evaluation.json"),
        [] if run is None else read_rows(run, "benchmark.json"),
    )


def _read_by(step: Step) -> str | None:
    """The model that a step read; None if there is none, or the files there are others now."""
    roles = ("teacher",) if step.command == "prune" else _LINKS
    role = next((role for role in roles if step.settings.get(role)), None)
    if role is None:
        return None
    name = str(step.settings[role])
    if not Path(name).exists():
        return name
    try:
        return name if open_model(name).fingerprint == step.inputs.get(role) else None
    except (XinslmError, OSError):
        return None


def _is_downloaded(name: str) -> bool:
    """Whether a name that is no path here is one of the Hub, and not a path that is gone."""
    from huggingface_hub import try_to_load_from_cache

    return bool(_HUB_NAME.fullmatch(name)) and isinstance(try_to_load_from_cache(name, CONFIG), str)


def _run_of(model: Path) -> Path | None:
    """The run folder that a model is, or is a checkpoint of."""
    places = (model, model.parent.parent) if model.parent.name == "checkpoints" else (model,)
    return next((place for place in places if (place / "run.json").is_file()), None)


def _step(path: Path) -> Step | None:
    """What made a folder: the record of a run, else its manifest."""
    run = _run_of(path)
    record = _json(run / "run.json") if run is not None else _json(path / MANIFEST)
    settings = record.get("settings" if run is not None else "config")
    if not isinstance(settings, dict):
        return None
    command = record.get("command") or ("prune" if "losses" in record else record.get("kind"))
    names = {"quantized": "quantize", "model": "import"}
    inputs = record.get("inputs")
    return Step(
        names.get(str(command), str(command)),
        settings,
        inputs if isinstance(inputs, dict) else {},
        {key: value for key, value in record.items() if key != "files"},
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def _front_matter(path: Path) -> Mapping[str, Any]:
    """What README.md of a folder, or a GGUF file, says of itself: `license`, `base_model`."""
    if path.is_file() and is_gguf(path):
        try:
            keys = GgufFile(path).keys
        except XinslmError:
            return {}
        url = _text(keys.get("general.base_model.0.repo_url")) or ""
        found = re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)/?", url)
        return {
            "license": keys.get("general.license"),
            "base_model": found[1] if found else None,
        }
    card = path / "README.md"
    if not card.is_file():
        return {}
    parts = re.match(r"---\r?\n(.*?)\r?\n---\s", card.read_text("utf-8", "replace"), re.S)
    try:
        content = yaml.safe_load(parts[1]) if parts else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _hub_name(value: Any) -> str | None:
    """A Hub name, OWNER/NAME."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and _HUB_NAME.fullmatch(value) else None


def short_name(value: Any) -> str:
    """A name without the folders of this machine: of a path its last part."""
    text = str(value)
    return text if _is_downloaded(text) else Path(text).name or text


def front_matter(fields: Mapping[str, Any]) -> str:
    """YAML between two lines of dashes, without the fields that are None."""
    lines: Iterator[str] = (
        f"{key}: {json.dumps(value)}\n"
        if isinstance(value, str)
        else f"{key}:\n" + "".join(f"- {json.dumps(item)}\n" for item in value)
        for key, value in fields.items()
        if value
    )
    return f"---\n{''.join(lines)}---\n"
