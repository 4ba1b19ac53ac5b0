"""Configuration of `cache merge`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import POSITIVE, SEED, TAIL_SAMPLE_MASS, Range, Settings, range_errors

_MERGE = {
    "top_k": Range(1, 256),
    "tail_sample_mass": TAIL_SAMPLE_MASS,
    "token_temperature": POSITIVE,
    "shard_positions": Range(1),
    "seed": SEED,
}


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Merge caches that several teachers made of one dataset: their weighted mixture."""

    caches: Annotated[tuple[Path, ...], POSITIONAL]
    """Cache folders to merge, two or more, all made from one dataset."""
    output_dir: Annotated[Path, Alias("-o")]
    """Cache folder to write; a run that was interrupted continues there."""
    data_path: Path | None = None
    """Dataset folder that was cached; by default the path stored in the first cache."""
    weights: tuple[float, ...] = ()
    """Weight of each cache, in their order; only ratios count. All the same, if not given."""
    domain_weights: Path | None = None
    """YAML file: a source's name or pattern ('code*.jsonl') to a list with a weight per cache."""
    token_temperature: float | None = None
    """tau: also weights teachers by p(token)^(1/tau) at each token; small: the best alone."""
    top_k: int | None = None
    """Tokens kept exactly; by default, and at most, the smallest top k of the caches."""
    tail_sample_mass: float | None = None
    """Largest part of the mixture that one tail sample stands for; by default the smallest of the
    caches that have tail samples."""
    shard_positions: int = 1 << 18
    """Approximate number of positions in a shard file."""
    seed: int = 0
    """Seed of the tail samples."""
    repair: bool = False
    """Rebuild only damaged and missing files of a finished cache; pass its other options too."""
    force: bool = False
    """Replace what is in the output folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _MERGE)
        if len(self.caches) < 2:
            wrong.append(f"give at least two caches to merge, not {len(self.caches)}")
        if self.weights:
            wrong += weight_errors(self.weights, len(self.caches), "weights")
        return wrong


def weight_errors(weights: tuple[float, ...], count: int, where: str) -> list[str]:
    """Sentences for what is wrong with the weights of `count` caches."""
    if len(weights) != count:
        return [
            f"{where}: {len(weights)} weights are given for {count} caches; give one for "
            "each, in their order"
        ]
    if any(Range(0).problem(weight) for weight in weights) or not sum(weights) > 0:
        listed = " ".join(f"{weight:g}" for weight in weights)
        return [
            f"{where} are {listed}, but each must be a finite number of at least 0, and one above 0"
        ]
    return []
