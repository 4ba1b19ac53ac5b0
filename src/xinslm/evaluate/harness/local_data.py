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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.harness.prepared import LateDataset
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


class LocalDatasets:
    """The files of a folder, as `datasets.load_dataset` would give their datasets."""

    def __init__(self, folder: Path, late: bool = False) -> None:
        """With `late`, rows may be prepared when they are asked for (`prepared.py`)."""
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; --data names one with the tasks' data")
        self.folder, self._kind = folder, LateDataset if late else datasets.Dataset
        self.files = {
            _plain(path.name.removesuffix(suffix)): path
            for suffix in sorted(SUFFIXES, key=len)
            for path in sorted(folder.iterdir())
            if path.name.endswith(suffix)
        }
        self.used: dict[str, str] = {}
        """SHA-256 of each file that was read, by name."""
        self._rows: dict[Path, list[dict[str, Any]]] = {}

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

    def _dataset(self, file: Path, subset: str | None) -> datasets.Dataset:
        if file not in self._rows:
            self._rows[file] = [_converted(row) for row in read_rows(file)]
            self.used[file.name] = sha256_file(file)
        rows = self._rows[file]
        if subset and rows and "subject" in rows[0]:
            rows = [row for row in rows if row["subject"] == subset]
            if not rows:
                raise UsageError(f"{file} has no rows with subject '{subset}'")
        return self._kind.from_list(rows)


class _Splits(dict[str, datasets.Dataset]):
    """Splits by name; one without a file is empty, because most tasks do not use all."""

    def __init__(self, name: str, splits: dict[str, datasets.Dataset]) -> None:
        super().__init__(splits)
        self.name = name

    def __missing__(self, split: str) -> datasets.Dataset:
        return next(iter(self.values())).select([])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl, .json (a list) or .parquet file, also .gz; XinslmError names file and
    line.
    """
    if path.suffix == ".parquet":
        return list(datasets.Dataset.from_parquet(str(path)))
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise XinslmError(f"{path} cannot be read: {error}") from None
    if ".jsonl" not in path.name:
        return _list(path, text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_record(line, f"{path}:{number}"))
    return rows


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


def _converted(row: dict[str, Any]) -> dict[str, Any]:
    """TruthfulQA's own {choice: label} as the Hub's {choices: [...], labels: [...]}."""
    return {
        key: {"choices": list(value), "labels": list(value.values())}
        if key in ("mc1_targets", "mc2_targets") and "choices" not in value
        else value
        for key, value in row.items()
    }


def _plain(name: str) -> str:
    """Lower case without separators."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@contextmanager
def local_datasets(folder: Path, late: bool = False) -> Iterator[LocalDatasets]:
    """Let `datasets.load_dataset`, which the harness calls, read from a folder inside; with `late`
    the rows that `prepared.py` knows are prepared when they are asked for.
    """
    local, original = LocalDatasets(folder, late), datasets.load_dataset
    datasets.load_dataset = local.load
    try:
        yield local
    finally:
        datasets.load_dataset = original
