"""What all checks share: an empty response passes none; counts are compared, and passes counted."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Check = Callable[..., bool]
"""`check(response, **arguments)`: whether a response follows one instruction."""
Relation = Literal["less than", "at least"]
"""How IFEval compares a count with a number."""


def answered(check: Check) -> Check:
    """Make a check false for a response without text, however it is worded ("no commas")."""

    @functools.wraps(check)
    def with_text(response: str, **arguments: Any) -> bool:
        return bool(response.strip()) and check(response, **arguments)

    return with_text


def holds(count: int, relation: Relation, number: int) -> bool:
    """Return whether `count` is less than, or at least, `number`."""
    return count < number if relation == "less than" else count >= number


@dataclass(frozen=True)
class Accuracy:
    """How many of those that were checked were right."""

    right: int
    checked: int

    @property
    def rate(self) -> float | None:
        """Share from 0 to 1; None if nothing was checked."""
        return self.right / self.checked if self.checked else None


def accuracy(values: Sequence[bool | None]) -> Accuracy:
    """Count what was right; None was not checked."""
    checked = [value for value in values if value is not None]
    return Accuracy(sum(checked), len(checked))
