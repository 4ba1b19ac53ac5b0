"""Whether rows of JSON are what `datasets` would make of them.

A `datasets.Dataset` has one type for each column: it fills in missing keys, and makes fractions of
whole numbers if a column has both. Rows whose types agree pass through it unchanged, so they need
no library.

    kind = common(map(kind_of, rows))       # MixedTypesError if they do not agree
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any

Kind = Any
"""A type; (list, kind of its entries); (dict, ((key, kind of its value), ...))."""
NOTHING = type(None)
"""The kind of null, which agrees with any other."""


class MixedTypesError(Exception):
    """Rows have different keys or types."""


def kind_of(value: Any) -> Kind:
    """The kind of a JSON value; MixedTypesError if the entries of a list do not agree."""
    found = type(value)
    if found is list:
        return list, common({kind_of(entry) for entry in value})
    if found is dict:
        return dict, tuple((key, kind_of(entry)) for key, entry in value.items())
    return found


def common(kinds: Iterable[Kind]) -> Kind:
    """The kind that all agree with; `NOTHING` if there are none."""
    return reduce(_merged, set(kinds), NOTHING)


def _merged(one: Any, other: Any) -> Kind:
    if one == other or other is NOTHING:
        return one
    if one is NOTHING:
        return other
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] is other[0]:
        if one[0] is list:
            return list, _merged(one[1], other[1])
        if [key for key, _ in one[1]] == [key for key, _ in other[1]]:
            pairs = zip(one[1], other[1], strict=True)
            return dict, tuple((a[0], _merged(a[1], b[1])) for a, b in pairs)
    raise MixedTypesError


def fits(value: Any, kind: Kind) -> bool:
    """Whether a value is of a kind that others have set."""
    try:
        return _merged(kind, kind_of(value)) == kind
    except MixedTypesError:
        return False
