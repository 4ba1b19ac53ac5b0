"""Benchmark items that are also in a model's training text, by shared runs of words.

Two texts overlap if they share 13 words in a row, without case and punctuation (GPT-3,
arXiv:2005.14165, appendix C). Shorter items are looked for as a whole if they have 8 words. Words
that several items of a task have in common, such as a chat template's system prompt, do not count.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from xinslm.data.dataset import open_dataset
from xinslm.errors import XinslmError
from xinslm.files import MANIFEST, read_json
from xinslm.tokenizer.load import load_tokenizer

RUN = 13
SHORTEST = 8


def words_in_common(texts: Mapping[str, Sequence[str]], folders: Sequence[Path]) -> dict[str, int]:
    """Number of texts under each name that overlap the train splits of datasets."""
    wanted: dict[tuple[str, ...], set[tuple[str, int]]] = {}
    for name, items in texts.items():
        for number, text in enumerate(items):
            for run in _runs(_words(text)):
                wanted.setdefault(run, set()).add((name, number))
    wanted = {run: own for run, owners in wanted.items() if (own := _of_one_item(owners))}
    sizes = sorted({len(run) for run in wanted})
    found: set[tuple[str, int]] = set()
    for document in _documents(folders):
        words = _words(document)
        for size in sizes:
            for at in range(len(words) - size + 1):
                found |= wanted.get(tuple(words[at : at + size]), set())
    return {name: sum(owner == name for owner, _ in found) for name in texts}


def _of_one_item(owners: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """The owners of a run without those of tasks in which several items have it."""
    count = Counter(name for name, _ in owners)
    return {owner for owner in owners if count[owner[0]] == 1}


def training_folders(model: Path) -> list[Path]:
    """Datasets that trained a run folder or calibrated a quantized or pruned folder, those of the
    models that it was made from, too; none for other models.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    waiting = [model]
    while waiting:
        model = waiting.pop(0)
        if model.resolve() in seen:
            continue
        seen.add(model.resolve())
        folder = model.parent.parent if model.parent.name == "checkpoints" else model
        settings, made = _run_settings(folder), _made_by(model)
        named = _paths(settings, "data_path", "mix_data", "prompts")
        if settings:
            named.append(folder / "data")  # raw text is prepared into the run folder
        elif "dataset" in made["inputs"]:  # without it, rounding had no use for --data-path
            named = _paths(made["config"], "data_path")
        found += [path for path in named if (path / MANIFEST).is_file() and path not in found]
        waiting += _paths(settings, "init_from", "student")
        waiting += _paths(made["config"], "model", "teacher")
    return found


def _paths(settings: Mapping[str, Any], *names: str) -> list[Path]:
    """The paths, one or several, under some names of a configuration."""
    values = [settings.get(name) or [] for name in names]
    return [Path(p) for value in values for p in ([value] if isinstance(value, str) else value)]


def _run_settings(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _made_by(folder: Path) -> dict[str, dict[str, Any]]:
    """Configuration and inputs in the manifest of a quantized, exported or imported folder."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    parts = manifest if isinstance(manifest, dict) else {}
    return {
        key: found if isinstance(found := parts.get(key), dict) else {}
        for key in ("config", "inputs")
    }


def _documents(folders: Iterable[Path]) -> Iterator[str]:
    for folder in folders:
        try:
            tokenizer = load_tokenizer(folder / "tokenizer")
            stored = open_dataset(folder).split("train")
        except XinslmError:
            continue
        for begin, end in zip(stored.documents, stored.documents[1:], strict=False):
            yield tokenizer.decode(stored.tokens[begin:end].tolist(), skip_special=True)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    if SHORTEST <= len(words) < RUN:
        yield tuple(words)
    for at in range(len(words) - RUN + 1):
        yield tuple(words[at : at + RUN])
