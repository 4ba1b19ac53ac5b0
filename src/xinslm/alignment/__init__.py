"""From a teacher's tokenizer to the student's: the same, nested, byte prefixes."""

from typing import Literal

Alignment = Literal["auto", "same", "nested", "byte_prefix"]
