"""Rows of JSON as a `datasets.Dataset` gives them, without that library, and prepared when they
are asked for.

Of a task's data the harness asks for the names of the columns, for rows, and for `map` with the
task's `process_docs`; that prepares all rows, such as HellaSwag's 10,042, before it is known which
of them are scored. Whatever else is asked for, `datasets` does on the same rows.

Preparing can wait only if no row depends on those before it, which a function does not say (others
shuffle choices), so the functions are named here. The types of the columns follow from the first
batch that `datasets` writes. That batch is prepared at once, and a row of other types is left to
`datasets`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from xinslm.evaluate.harness.row_types import MixedTypesError, common, fits, kind_of

if TYPE_CHECKING:
    import datasets

ROW_BY_ROW = ("lm_eval.tasks.hellaswag.utils.process_docs.<locals>._process_doc",)
"""Functions whose result for a row depends on that row alone."""
FIRST_BATCH = 1000
"""Rows that `Dataset.map` writes at once; it takes the types of all rows from them."""
Row = dict[str, Any]


class LateDataset(Sequence[Row]):
    """Rows of the same keys and types (`row_types.py`), a JSON object each."""

    def __init__(self, lines: Sequence[bytes], parse: Callable[[bytes], Row] = json.loads) -> None:
        self._lines, self._parse = lines, parse

    @classmethod
    def from_list(cls, rows: Sequence[Row]) -> "LateDataset":
        """The rows as JSON holds them."""
        return cls([json.dumps(row).encode() for row in rows])

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, number: int) -> Row:
        """A row of its own, which the caller may change."""
        return self._parse(self._lines[number])

    def __getitem__(self, key: Any) -> Any:
        """The row of a number; anything else is that of a dataset."""
        if not isinstance(key, int):
            return self.whole[key]
        return self.row(range(len(self))[key])

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copies and pickles ask for methods of their own
            raise AttributeError(name)
        return getattr(self.whole, name)

    @cached_property
    def whole(self) -> "datasets.Dataset":
        """All rows as a dataset."""
        from datasets.arrow_dataset import Dataset

        return Dataset.from_list(list(self))

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.row(0)) if len(self) else []

    @property
    def features(self) -> "Columns":
        """Names of the columns, and types that `datasets` finds."""
        return Columns(self)

    def select(self, numbers: Sequence[int]) -> "LateDataset":
        """Rows by their numbers; IndexError if there is no such row."""
        return LateDataset([self._lines[n] for n in self._places(numbers)], self._parse)

    def _places(self, numbers: Sequence[int]) -> list[int]:
        return [range(len(self))[number] for number in numbers]

    def map(self, function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
        """`Dataset.map`, or rows that are prepared later."""
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
        if args or options or function is None or name not in ROW_BY_ROW:
            return self.whole.map(function, *args, **options)
        return PreparedRows(self, function)


class PreparedRows(LateDataset):
    """`rows.map(function)`, of which only the rows that are asked for are computed."""

    def __init__(self, rows: LateDataset, function: Callable[..., Any]) -> None:
        super().__init__(rows._lines, rows._parse)
        self._rows, self._function = rows, function
        head = (self._prepared(number) for number in range(min(len(rows), FIRST_BATCH)))
        try:
            self._kind = common(map(kind_of, head))
        except MixedTypesError:
            self._kind = None

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, the prepared ones last."""
        kind: Any = self._kind
        return [key for key, _ in kind[1]] if isinstance(kind, tuple) else super().column_names

    def _prepared(self, number: int) -> Row:
        row = self._rows.row(number)
        return row | self._function(row)

    def row(self, number: int) -> Row:
        """A prepared row."""
        if self._kind is not None and "whole" not in vars(self):
            found = self._prepared(number)
            if fits(found, self._kind):
                return found
        whole: Row = self.whole[number]
        return whole

    @cached_property
    def whole(self) -> "datasets.Dataset":
        """All rows, prepared at once."""
        return self._rows.whole.map(self._function)

    def select(self, numbers: Sequence[int]) -> Any:
        """Rows by their numbers; IndexError if there is no such row."""
        return [self.row(number) for number in self._places(numbers)]


class Columns(Mapping[str, Any]):
    """Names of columns, whose types need `datasets`."""

    def __init__(self, rows: LateDataset) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows.column_names)

    def __len__(self) -> int:
        return len(self._rows.column_names)

    def __getitem__(self, name: str) -> Any:
        return self._rows.whole.features[name]
