"""Which packed sequences a training step takes, from one set of them or from several.

The choice is a function of the seed and the step, so a continued run repeats the uninterrupted one.
Each source gives its rows in an endless chain of permutations, one per epoch. With several sources,
each place of a batch is assigned by a golden-ratio sequence, which keeps to the shares within a row
or two in every stretch. The loss is divided by the targets of the step, whatever their
source; with `balanced`, each source's mean counts by its share instead.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xinslm.data.packing import PackedDataset
from xinslm.losses.config import LossConfig
from xinslm.train.interfaces import TargetSource

GOLDEN = 0.6180339887498949


def always(step: int) -> float:
    """A weight that stays 1."""
    return 1.0


@dataclass(frozen=True)
class Source:
    """Packed sequences, their teacher targets, and the loss they are trained with."""

    rows: PackedDataset
    targets: TargetSource | None
    loss: LossConfig
    share: float = 1.0
    """Part of the steps' rows, relative to the other sources'."""
    weight: Callable[[int], float] = always
    """Factor of this source's loss at a step."""


@dataclass(frozen=True)
class Part:
    """The rows of one step that come from one source."""

    source: Source
    indices: np.ndarray


def indices_of_step(
    step: int, batch_size: int, num_rows: int, seed: int, source: int = 0
) -> np.ndarray:
    """Indices of a step's rows if all come from one source."""
    return shuffled(np.arange(step * batch_size, (step + 1) * batch_size), num_rows, seed, source)


def shuffled(places: np.ndarray, num_rows: int, seed: int, source: int = 0) -> np.ndarray:
    """Rows at places of an endless chain of permutations of `num_rows`, one per epoch."""
    epochs, within = np.divmod(places, num_rows)
    chain = (_order(seed, source, int(e), num_rows)[i] for e, i in zip(epochs, within, strict=True))
    return np.fromiter(chain, dtype=np.int64, count=len(places))


@functools.lru_cache(maxsize=8)
def _order(seed: int, source: int, epoch: int, num_rows: int) -> np.ndarray:
    # the first source has the order of a run with one source
    key = (seed, source, epoch) if source else (seed, epoch)
    return np.random.default_rng(key).permutation(num_rows)


class RowSampler:
    """Rows of each step from several sources; the first step is number `first_step`."""

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        balanced: bool = False,
    ) -> None:
        self.sources, self.batch_size, self.seed = list(sources), batch_size, seed
        self.first_step, self.balanced = first_step, balanced
        shares = np.array([source.share for source in sources])
        assert len(sources) and (shares > 0).all() and all(len(source.rows) for source in sources)
        self.shares = shares / shares.sum()
        if len(sources) == 1:
            return
        start = np.random.default_rng(seed).random()
        points = (start + GOLDEN * np.arange(steps * batch_size)) % 1.0
        bounds = np.cumsum(self.shares)[:-1]
        self._source_of = np.searchsorted(bounds, points, side="right").astype(np.uint8)
        # how many rows its source has given before
        self._rank = np.empty(len(points), dtype=np.int64)
        for number in range(len(sources)):
            mine = self._source_of == number
            self._rank[mine] = np.arange(mine.sum())

    def of_step(self, number: int) -> list[Part]:
        """The rows of step `number`, by source."""
        step = number - self.first_step
        if len(self.sources) == 1:
            rows = indices_of_step(step, self.batch_size, len(self.sources[0].rows), self.seed)
            return [Part(self.sources[0], rows)]
        places = slice(step * self.batch_size, (step + 1) * self.batch_size)
        source_of, rank = self._source_of[places], self._rank[places]
        assert len(rank) == self.batch_size, f"step {number} is not in this plan"
        parts = []
        for index, source in enumerate(self.sources):
            mine = rank[source_of == index]
            if len(mine):
                parts.append(Part(source, shuffled(mine, len(source.rows), self.seed, index)))
        return parts

    def losses(self, number: int, parts: Sequence[Part], counts: Sequence[int]) -> list[LossConfig]:
        """The loss of each part, scaled by its weight; `counts` are the parts' target tokens."""
        total, result = sum(counts), []
        for part, count in zip(parts, counts, strict=True):
            factor = part.source.weight(number)
            if self.balanced and count:
                factor *= float(self.shares[self.sources.index(part.source)]) * total / count
            loss = part.source.loss
            result.append(replace(loss, alpha=loss.alpha * factor, beta=loss.beta * factor))
        return result
