"""Reads records of Hugging Face datasets: a Hub name, or a folder written by `save_to_disk`.

The `datasets` library handles the formats and the cache. A Hub dataset is streamed, so only the
records that are read are downloaded. The library's many exception types become one message that
says what to do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError


def is_saved_dataset(path: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_saved(folder: Path, split: str) -> Iterator[tuple[Any, str]]:
    """Yield records of a saved dataset (of a saved dict, the given split) with 'folder:row'."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise XinslmError(f"{folder}: not a valid saved dataset ({_first_line(error)})") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            splits = ", ".join(data)
            raise UsageError(
                f"{folder} has no split '{split}'; choose with --dataset-split: {splits}"
            )
        data = data[split]
    yield from ((record, f"{folder}:{row}") for row, record in enumerate(data, start=1))


def read_hub(name: str, configuration: str | None, split: str) -> Iterator[tuple[Any, str]]:
    """Stream records of a Hub dataset with 'name:row'."""
    import datasets

    try:
        data = datasets.load_dataset(name, configuration, split=split, streaming=True)
        yield from ((record, f"{name}:{row}") for row, record in enumerate(data, start=1))
    except XinslmError:
        raise
    except Exception as error:
        raise XinslmError(
            f"{name} is not a local path, and the Hugging Face dataset of that name could not be "
            f"read ({type(error).__name__}: {_first_line(error)}). Check the spelling, "
            "--dataset-name, --dataset-split and the connection; without one, pass --data-path "
            "the files or a folder written by save_to_disk"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
