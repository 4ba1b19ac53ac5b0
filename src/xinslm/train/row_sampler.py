"""Several sets of rows in one training run, each with its own teacher distributions and its own
loss.

Which source a row of a step comes from, and which row of it, follow from the seed and the step
alone: places of the endless list of rows are dealt by a golden-ratio sequence, which keeps to the
shares within a row or two in every stretch, and each source deals its own rows in an endless chain
of permutations. So a continued run repeats the uninterrupted one. The divisor of the loss is the
number of targets of the whole step, whatever their source; where answers of unequal length are to
weigh alike (`balanced`), each source's mean counts by its share instead.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xinslm.data.packing import PackedRows
from xinslm.distill.target_sources import TargetSource
from xinslm.losses.config import LossConfig

GOLDEN = 0.6180339887498949


def always(step: int) -> float:
    """A weight that stays 1."""
    return 1.0


@dataclass(frozen=True)
class Source:
    """Rows, what a teacher says about them, and the loss they are trained with."""

    rows: PackedRows
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


class RowPlan:
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
        start = np.random.default_rng(seed).random()
        points = (start + GOLDEN * np.arange(steps * batch_size)) % 1.0
        bounds = np.cumsum(self.shares)[:-1]
        self._source_of = np.searchsorted(bounds, points, side="right").astype(np.uint8)
        # how many rows its source has dealt before
        self._rank = np.empty(len(points), dtype=np.int64)
        for number in range(len(sources)):
            mine = self._source_of == number
            self._rank[mine] = np.arange(mine.sum())

    def of_step(self, number: int) -> list[Part]:
        """The rows of step `number`, by source."""
        begin = (number - self.first_step) * self.batch_size
        places = slice(begin, begin + self.batch_size)
        source_of, rank = self._source_of[places], self._rank[places]
        assert len(rank) == self.batch_size, f"step {number} is not in this plan"
        parts = []
        for index, source in enumerate(self.sources):
            epochs, within = np.divmod(rank[source_of == index], len(source.rows))
            rows = [
                _order(self.seed, index, int(e), len(source.rows))[i]
                for e, i in zip(epochs, within, strict=True)
            ]
            if rows:
                parts.append(Part(source, np.array(rows)))
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


@functools.lru_cache(maxsize=8)
def _order(seed: int, source: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, source, epoch)).permutation(num_rows)
