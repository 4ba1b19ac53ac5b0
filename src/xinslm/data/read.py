"""Reads raw corpora as a stream of documents: files, folders of files, Hugging Face datasets.

    for document in read_documents(["stories.jsonl.gz", "books/", "roneneldan/TinyStories"]):
        print(document.source, document.text or document.messages)

An existing path takes precedence over a dataset of the same name. All paths are checked before the
first is read.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.data.config import SplitDocuments
from xinslm.data.formats import ENDINGS, SUFFIXES, read_file, suffix
from xinslm.data.hub import is_saved_dataset, read_hub, read_saved
from xinslm.data.records import Document, to_document
from xinslm.errors import UsageError, XinslmError


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading; the fields are those of `PrepareConfig`."""

    split_documents: SplitDocuments = "auto"
    text_field: str | None = None
    dataset_name: str | None = None
    dataset_split: str = "train"
    on_note: Callable[[str], None] = lambda note: None
    """Called with a sentence for each file that was skipped."""


def read_documents(paths: Iterable[str], options: ReadOptions | None = None) -> Iterator[Document]:
    """Read all documents of files, folders and Hugging Face datasets, in the order given.

    Empty documents are skipped; XinslmError if all are empty. UsageError if a path is missing.
    """
    options = options or ReadOptions()
    paths = list(paths)
    if not paths:
        raise UsageError(
            "no data given; pass files, folders or Hugging Face datasets to --data-path"
        )
    sources = [_resolve(path) for path in paths]  # every path is checked before the first is read
    found = False
    for source in sources:
        for document in _read_source(source, options):
            found = True
            yield document
    if not found:
        raise XinslmError(f"{', '.join(paths)}: there is no text; every document is empty")


def _resolve(path: str) -> Path | str:
    """Return the existing path that `path` names, or `path` if it is a Hub dataset's name."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    is_hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not here.parent.exists()
    if is_hub_name and suffix(here) not in SUFFIXES:
        return path
    hint = ""
    if re.fullmatch(r"\w[\w-]*", path):
        hint = ". Datasets of the Hugging Face Hub are named with their owner: OWNER/NAME"
    raise UsageError(f"{path} does not exist.{_near(here)}{hint}")


def _near(path: Path) -> str:
    """Suggest existing paths with names similar to a missing one."""
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        return f" Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f" {parent.resolve()} exists, but has no entry of a similar name"


def _read_source(source: Path | str, options: ReadOptions) -> Iterator[Document]:
    """Read a result of `_resolve` without empty documents; report an empty file as a note."""
    if isinstance(source, str):
        records = read_hub(source, options.dataset_name, options.dataset_split)
        yield from _to_documents(records, options)
    elif is_saved_dataset(source):
        yield from _to_documents(read_saved(source, options.dataset_split), options)
    elif source.is_file() and suffix(source) not in SUFFIXES:
        raise UsageError(
            f"{source}: unknown file type. Known suffixes: {ENDINGS}; rename the file if it is "
            "of one of these types"
        )
    else:
        for file in _files(source, options) if source.is_dir() else [source]:
            found = False
            for document in _nonempty(read_file(file, options.split_documents, options.text_field)):
                found = True
                yield document
            if not found:
                options.on_note(f"{file} is empty")


def _to_documents(records: Iterable[tuple[Any, str]], options: ReadOptions) -> Iterator[Document]:
    return _nonempty(to_document(record, where, options.text_field) for record, where in records)


def _nonempty(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        if document.messages is not None or (document.text and not document.text.isspace()):
            yield document


def _files(folder: Path, options: ReadOptions) -> list[Path]:
    """List the usable files below a folder, sorted; hidden files are skipped."""
    below = {p: p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    files = sorted(p for p, name in below.items() if not any(x[0] == "." for x in name.parts))
    usable = [file for file in files if suffix(file) in SUFFIXES]
    ignored = [str(file.relative_to(folder)) for file in files if suffix(file) not in SUFFIXES]
    if not usable:
        what = f"only {', '.join(ignored[:5])}" if ignored else "no file"
        raise UsageError(f"{folder} contains {what}. Known suffixes: {ENDINGS}")
    if ignored:
        more = f" and {len(ignored) - 5:,} more" if len(ignored) > 5 else ""
        names = ", ".join(ignored[:5]) + more
        options.on_note(f"{folder}: skipped {names} (known suffixes: {ENDINGS})")
    return usable
