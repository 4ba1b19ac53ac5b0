"""Types, ranges and checks of settings: one table per configuration, one sentence per wrong value.

A range is checked as `low <= value <= high`, so that NaN, which no comparison holds for, is always
outside.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from xinslm.errors import UsageError

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of a model's weights and activations. auto: float32, with the factors of matrix products rounded
to bfloat16 on CPUs with AMX; text is generated in bfloat16 where the processor multiplies that
faster.
"""
Activations = Literal["float", "int8"]
"""Inputs of linear layers with codes: as they are, or rounded to 8 bits as llama.cpp does."""
ComputeDtype = Literal["auto", "float32", "bfloat16"]


class Range(NamedTuple):
    """From `low` to `high`, both included unless the flags say otherwise; always finite."""

    low: float
    high: float = math.inf
    above: bool = False
    """Whether `low` itself is outside."""
    below: bool = False
    """Whether `high` itself is outside."""
    or_zero: bool = False
    """Whether 0 is allowed as well."""

    def problem(self, value: float) -> str | None:
        """What a value must be and is not ('at least 1'), or None where it is in the range."""
        if not -sys.float_info.max <= value <= sys.float_info.max:
            return "a finite number"
        if self.or_zero and value == 0:
            return None
        if value < self.low or (self.above and value == self.low):
            return f"{'above' if self.above else 'at least'} {self.low:,}{self._zero}"
        if value > self.high or (self.below and value == self.high):
            return f"{'below' if self.below else 'at most'} {self.high:,}{self._zero}"
        return None

    @property
    def _zero(self) -> str:
        return ", or 0" if self.or_zero else ""


POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
SEED = Range(0, 2**31 - 1)
CONTEXT = Range(2, 1_000_000)
TAIL_SAMPLE_MASS = Range(0.004, 1, or_zero=True)
"""Of a cache. At most 250 samples of a tail, whose number is stored in a byte; 0: none."""


def range_errors(config: Any, ranges: Mapping[str, Range], prefix: str = "") -> list[str]:
    """Sentences for the fields of `config` that are outside their range; a field that is None is
    not given.
    """
    wrong = []
    for name, bounds in ranges.items():
        value = getattr(config, name)
        problem = None if value is None else bounds.problem(value)
        if problem is not None:
            wrong.append(f"{prefix}{name} is {value}, but must be {problem}")
    return wrong


class Settings:
    """Base class of configurations: `check` reports all errors at once."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return []

    def check(self) -> None:
        """Raise UsageError listing everything that cannot work."""
        if wrong := self.errors():
            raise UsageError("\n".join(wrong))
