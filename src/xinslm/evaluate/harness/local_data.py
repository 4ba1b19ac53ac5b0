"""Data of harness tasks from files on disk instead of the Hub.

A task names a dataset, sometimes a subset, and its splits. The file of a split is called
DATASET_SPLIT or DATASET_SUBSET_SPLIT, with the ending .jsonl, .json or .parquet (the first two also
with .gz): `hellaswag_val.jsonl.gz`, `mmlu_test.jsonl.gz`, `gsm8k_test.jsonl`. Case, "-" and "_" do
not matter, "val" is short for "validation", and a dataset with one split may leave it out
(`ifeval.jsonl`). If a file without the subset's name has a column `subject`, only the rows of the
subset are taken. The authors' TruthfulQA file (`truthfulqa_mc_817.json`) is read as it is.

    with local_datasets(Path("bench")):
        TaskManager().load(["mmlu"])
"""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.harness.prepared import LateDataset
from xinslm.evaluate.harness.row_types import Kind, MixedTypesError, common, kind_of
from xinslm.evaluate.harness.start import LateModule
from xinslm.files import sha256_file

SPLITS = {
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
    "train": ("train",),
    "dev": ("dev",),
}
SUBSETS = {"multiplechoice": "mc", "generation": "gen"}
"""Short names of subsets in file names."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class _File:
    """The rows of a file."""

    lines: list[bytes]
    """A JSON object each; parsed, rows take three times the memory."""
    is_uniform: bool
    """Whether all have the same keys and types."""
    subjects: list[str] | None
    """The subset of each row, if rows have one."""


class LocalDatasets:
    """The files of a folder, as `datasets.load_dataset` would give their datasets."""

    def __init__(self, folder: Path, late: bool = False) -> None:
        """With `late`, they are no `datasets.Dataset` until they must be (`prepared.py`)."""
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; --data names one with the tasks' data")
        self.folder, self.late = folder, late
        self.files = {
            _plain(path.name.removesuffix(suffix)): path
            for suffix in sorted(SUFFIXES, key=len)
            for path in sorted(folder.iterdir())
            if path.name.endswith(suffix)
        }
        self.used: dict[str, str] = {}
        """SHA-256 of each file that was read, by name."""
        self._rows: dict[Path, _File] = {}

    def load(self, path: str, name: str | None = None, **options: Any) -> "_Splits":
        """The splits of dataset `path` (a Hub name) and its subset `name`."""
        dataset = _plain(path.rpartition("/")[2])
        subset = _plain(name or "")
        subsets = [*dict.fromkeys((subset, SUBSETS.get(subset, subset))), ""]
        names = [(f"{dataset}{part}", part == "") for part in subsets]
        found = {}
        for split, words in SPLITS.items():
            for stem, whole in names:
                for word in (*words, ""):
                    file = self._file(f"{stem}{word}")
                    if file is not None and split not in found:
                        found[split] = self._dataset(file, name if whole else None)
        if not found:
            raise UsageError(
                f"{self.folder} has no data of {path}"
                + (f" ({name})" if name else "")
                + f": put {dataset}_{{split}}.jsonl there, or leave out --data to load it "
                "from the Hub"
            )
        return _Splits(path, found)

    def _file(self, stem: str) -> Path | None:
        if stem in self.files:
            return self.files[stem]
        numbered = [name for name in self.files if re.fullmatch(re.escape(stem) + r"\d+", name)]
        return self.files[numbered[0]] if numbered else None

    def _dataset(self, file: Path, subset: str | None) -> Any:
        if file.name not in self.used:
            self.used[file.name] = sha256_file(file)
        if file.suffix == ".parquet":
            return _of_subset(_parquet(file), file, subset)
        if file not in self._rows:
            self._rows[file] = _read(file)
        rows = self._rows[file]
        lines = rows.lines
        if subset and rows.subjects is not None:
            pairs = zip(lines, rows.subjects, strict=True)
            lines = [line for line, subject in pairs if subject == subset]
            _require_rows(lines, file, subset)
        found = LateDataset(lines, _parse)
        return found if self.late and rows.is_uniform else found.whole


class _Splits(dict[str, Any]):
    """Splits by name; one without a file is empty, because most tasks do not use all."""

    def __init__(self, name: str, splits: dict[str, Any]) -> None:
        super().__init__(splits)
        self.name = name

    def __missing__(self, split: str) -> Any:
        return next(iter(self.values())).select([])


def _parquet(file: Path) -> list[dict[str, Any]]:
    from datasets.arrow_dataset import Dataset

    return list(Dataset.from_parquet(str(file)))


def _of_subset(rows: list[dict[str, Any]], file: Path, subset: str | None) -> Any:
    from datasets.arrow_dataset import Dataset

    if subset and rows and "subject" in rows[0]:
        rows = [row for row in rows if row["subject"] == subset]
        _require_rows(rows, file, subset)
    return Dataset.from_list(rows)


def _require_rows(rows: Sequence[Any], file: Path, subset: str) -> None:
    if not rows:
        raise UsageError(f"{file} has no rows with subject '{subset}'")


def _read(path: Path) -> _File:
    """Rows of a .jsonl or .json (a list) file, also .gz; XinslmError names file and line."""
    lines: list[bytes] = []
    kinds: set[Kind] = set()
    subjects: list[str] = []
    is_uniform = True
    for line, row in _records(path):
        lines.append(line)
        if is_uniform:
            try:
                kinds.add(kind_of(_converted(row)))
            except MixedTypesError:
                is_uniform = False
        if "subject" in row:
            subjects.append(row["subject"])
    try:
        common(kinds)
    except MixedTypesError:
        is_uniform = False
    has_subjects = bool(lines) and len(subjects) == len(lines)
    return _File(lines, is_uniform, subjects if has_subjects else None)


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each row as JSON text, and what it holds."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if ".jsonl" not in path.name:
                for row in _list(path, file.read().decode("utf-8")):
                    yield json.dumps(row).encode(), row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield line, _record(line.decode("utf-8"), f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise XinslmError(f"{path} cannot be read: {error}") from None


def _list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise XinslmError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise XinslmError(f"{path} must be a list of objects")
    return rows


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise XinslmError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise XinslmError(f"{place} must be an object")
    return row


def _parse(line: bytes) -> dict[str, Any]:
    return _converted(json.loads(line))


def _converted(row: dict[str, Any]) -> dict[str, Any]:
    """TruthfulQA's own {choice: label} as the Hub's {choices: [...], labels: [...]}."""
    for key in ("mc1_targets", "mc2_targets"):
        if key in row and "choices" not in row[key]:
            choices = row[key]
            row[key] = {"choices": list(choices), "labels": list(choices.values())}
    return row


def _plain(name: str) -> str:
    """Lower case without separators."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@contextmanager
def local_datasets(folder: Path, late: bool = False) -> Iterator[LocalDatasets]:
    """Let `datasets.load_dataset`, which the harness calls, read from a folder inside; with `late`
    without that library, as far as `prepared.py` can.
    """
    local = LocalDatasets(folder, late)
    import datasets

    original = vars(datasets).get("load_dataset")
    datasets.load_dataset = local.load
    try:
        yield local
    finally:
        if original is not None:
            datasets.load_dataset = original
        elif isinstance(datasets, LateModule):
            del vars(datasets)["load_dataset"]
        else:  # it was imported inside
            from datasets.load import load_dataset

            datasets.load_dataset = load_dataset
