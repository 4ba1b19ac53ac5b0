"""Rows that the harness's `process_docs` prepares when they are asked for.

A task's `process_docs` calls `Dataset.map`, which prepares all rows, such as HellaSwag's 10,042,
before it is known which of them are scored. Rows can wait only if none depends on those before it,
which a function does not say (others shuffle choices), so the functions are named here. The types
of the columns follow from the first batch that `datasets` writes, so that batch is prepared as
ever, and all other rows take its types.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import datasets

ROW_BY_ROW = ("lm_eval.tasks.hellaswag.utils.process_docs.<locals>._process_doc",)
"""Functions whose result for a row depends on that row alone."""
FIRST_BATCH = 1000
"""Rows that `Dataset.map` writes at once; it takes the types of all rows from them."""


class LateDataset(datasets.Dataset):
    """A dataset that leaves the functions of `ROW_BY_ROW` to `PreparedRows`."""

    def map(self, function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
        """`Dataset.map`, or rows that are prepared later."""
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
        if args or options or function is None or name not in ROW_BY_ROW:
            return super().map(function, *args, **options)
        return PreparedRows(self, function)


class PreparedRows(Sequence[dict[str, Any]]):
    """`rows.map(function)`, of which only the rows that are asked for are computed."""

    def __init__(self, rows: LateDataset, function: Callable[..., Any]) -> None:
        self._rows, self._function = rows, function
        self._head = rows.select(range(min(len(rows), FIRST_BATCH))).map(function)
        self.features = self._head.features

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> Any:
        """The row of a number; anything else is that of the whole dataset, prepared."""
        if not isinstance(key, int):
            return self.whole[key]
        return self.select([range(len(self))[key]])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    @cached_property
    def whole(self) -> datasets.Dataset:
        """All rows, prepared at once."""
        return datasets.Dataset.map(self._rows, self._function)

    def select(self, numbers: Sequence[int]) -> datasets.Dataset:
        """Rows by their numbers; IndexError if there is no such row."""
        if "whole" in vars(self) or len(numbers) > len(self) // 2:
            return self.whole.select(numbers)
        if max(numbers) < len(self._head) and min(numbers) >= 0:
            return self._head.select(numbers)
        return self._rows.select(numbers).map(self._function, features=self.features)
