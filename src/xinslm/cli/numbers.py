"""Numbers on the command line, read as in YAML, so that both complain in the same words."""

import types
import typing
from typing import Any, Union

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from xinslm.config import to_number

REGISTRY = ConstructorRegistry()
"""Makes `tyro.cli` read `int`, `float` and either of them or None."""


@REGISTRY.primitive_rule
def number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How tyro reads a number; None for any other type."""
    kinds: list[type] = [info.type]
    if typing.get_origin(info.type) in (Union, types.UnionType):
        kinds = list(typing.get_args(info.type))
    optional = type(None) in kinds
    kind = next((kind for kind in kinds if kind in (int, float)), None)
    if kind is None or len(kinds) > 1 + optional:
        return None

    def read(words: list[str]) -> float | None:
        return None if optional and words[0] == "None" else to_number(kind, words[0])

    def is_instance(value: Any) -> bool:
        if value is None:
            return optional
        return isinstance(value, int | kind) and not isinstance(value, bool)

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=("{None}|" if optional else "") + kind.__name__.upper(),
        instance_from_str=read,
        is_instance=is_instance,
        str_from_instance=lambda value: [str(value)],
    )
