"""Weights of several teachers' caches for each document: the same everywhere, or by the source it
was read from.

A YAML file names sources by pattern, the first that fits counts; sources that none fits take the
general weights.

    code*.jsonl: [0, 1, 0]
    stories.txt: [2, 1, 1]
"""

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xinslm.cache.merge_config import weight_errors
from xinslm.data.dataset import Dataset
from xinslm.errors import UsageError

Table = dict[str, tuple[float, ...]]


def document_weights(
    weights: tuple[float, ...],
    domain_weights: Path | None,
    count: int,
    dataset: Dataset,
    split: str,
) -> np.ndarray:
    """Weights of the caches in each document, (documents, count) float64; rows sum to 1."""
    general = weights or (1.0,) * count
    if domain_weights is None:
        documents = len(dataset.split(split).document_bytes)
        of_document = np.tile(np.array(general, dtype=np.float64), (documents, 1))
    else:
        sources = dataset.sources(split)
        table = read_table(domain_weights, count)
        of_source = _of_sources(table, dataset.manifest["source_names"], general, domain_weights)
        of_document = of_source[sources]
    return of_document / of_document.sum(axis=1, keepdims=True)


def read_table(path: Path, count: int) -> Table:
    """Read a YAML file of patterns with `count` weights each."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--domain-weights {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--domain-weights {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict) or not content:
        raise UsageError(
            f"--domain-weights {path}: must hold lines such as 'code*.jsonl: [1, 0]', a source each"
        )
    wrong, table = [], {}
    for name, row in content.items():
        kinds = {type(x) for x in row} if isinstance(row, list) else {None}
        if not kinds <= {int, float}:
            wrong.append(f"{path}: the weights of '{name}' must be a list of numbers, not {row!r}")
            continue
        wrong += weight_errors(tuple(row), count, f"{path}: the weights of '{name}'")
        table[str(name)] = tuple(float(x) for x in row)
    if wrong:
        raise UsageError("\n".join(wrong))
    return table


def _of_sources(
    table: Table, names: list[str], general: tuple[float, ...], path: Path
) -> np.ndarray:
    """Weights of each source, (sources, caches)."""

    def fits(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(Path(name).name, pattern)

    for pattern in table:
        if not any(fits(name, pattern) for name in names):
            raise UsageError(
                f"--domain-weights {path}: no source of the dataset is called '{pattern}'. It "
                f"has: {', '.join(names)}"
            )
    rows = [
        next((row for pattern, row in table.items() if fits(name, pattern)), general)
        for name in names
    ]
    return np.array(rows, dtype=np.float64).reshape(len(names), len(general))
