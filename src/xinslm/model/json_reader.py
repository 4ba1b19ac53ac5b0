"""Entries of a parsed JSON object with the type that they must have."""

import json
from typing import Any, NoReturn

from xinslm.errors import XinslmError
from xinslm.ranges import POSITIVE


class JsonReader:
    """Entries of a parsed JSON object by type; an XinslmError names file, key and value of what is
    another.
    """

    def __init__(self, values: dict[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def whole(self, key: str, default: int | None = None) -> int:
        """An integer; without a default it must be there."""
        value = self._get(key, default)
        return value if type(value) is int else self._refuse(key, value, "an integer")

    def whole_or_null(self, key: str, default: int | None = None) -> int | None:
        """An integer or null."""
        value = self.values.get(key, default)
        return (
            value
            if value is None or type(value) is int
            else self._refuse(key, value, "an integer or null")
        )

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if type(value) not in (int, float) or POSITIVE.problem(abs(value)) == "a finite number":
            self._refuse(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Either true or false."""
        value = self.values.get(key, default)
        return value if isinstance(value, bool) else self._refuse(key, value, "true or false")

    def token(self, key: str) -> int | None:
        """A token's id or null; LLaMA-3 lists several end ids, of which the first closes a
        document.
        """
        value = self.values.get(key)
        first = value[0] if isinstance(value, list) and value else value
        return (
            first
            if first is None or type(first) is int
            else self._refuse(key, value, "an id, ids or null")
        )

    def entries(self, key: str) -> dict[str, Any] | None:
        """An object or null."""
        value = self.values.get(key)
        return (
            value
            if value is None or isinstance(value, dict)
            else self._refuse(key, value, "an object or null")
        )

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.values and default is None:
            raise XinslmError(f"{self.where}: key '{self.prefix}{key}' is missing")
        return self.values.get(key, default)

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise XinslmError(
            f"{self.where}: {self.prefix}{key} is {json.dumps(value):.80}, but must be {wanted}"
        )
