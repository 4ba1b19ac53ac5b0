"""Configuration of `cache`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xinslm.errors import UsageError
from xinslm.ranges import POSITIVE, SEED, Range, range_errors

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16"]

CONTEXT = Range(2, 1_000_000)
_CACHE = {
    "head": Range(1, 256),
    "draws": Range(0, 64),
    "temperature": POSITIVE,
    "max_seq_length": CONTEXT,
    "batch_tokens": Range(1),
    "shard_positions": Range(1),
    "seed": SEED,
}


@dataclass(frozen=True)
class CacheConfig:
    """Score a dataset with a teacher, once, into a sparse cache."""

    teacher: Annotated[str, tyro.conf.Positional]
    """Teacher: a model folder or a Hub name; any Hugging Face causal language model."""
    data_path: Path
    """Dataset folder made by `xinslm prepare`."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Cache folder to write; a run that was interrupted continues there."""
    head: int = 8
    """Most likely tokens kept exactly at each position."""
    draws: int = 4
    """Tokens drawn from the rest of the distribution; take 8 for three epochs and more."""
    temperature: float = 2.0
    """Temperature whose normaliser is stored, for a loss with temperature_mode full."""
    max_seq_length: int = 512
    """Longest context in tokens the teacher sees; use the student's."""
    batch_tokens: int = 8192
    """Tokens a teacher's forward pass takes."""
    shard_positions: int = 1 << 18
    """Positions a shard file holds, about: what an interruption costs at most."""
    dtype: Dtype = "float32"
    """The teacher's number type."""
    device: Device = "auto"
    """Where the teacher runs; auto takes cuda, then mps, then cpu."""
    revision: str | None = None
    """Hub revision of the teacher."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository brings."""
    seed: int = 0
    """Seed of the draws."""
    force: bool = False
    """Replace what stands in the output folder."""

    def check(self) -> None:
        """Raise UsageError listing everything that cannot work."""
        if wrong := range_errors(self, _CACHE):
            raise UsageError("\n".join(wrong))
