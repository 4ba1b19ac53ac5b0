"""pass@k: the chance that at least one of k samples is correct (Chen et al., arXiv:2107.03374)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PassAtK:
    """Mean of pass@k over problems."""

    k: int
    value: float
    standard_error: float | None
    """Of the mean over problems, sample deviation / sqrt(n); None for a single problem."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate pass@k without bias from n samples of which c are correct: 1 - C(n-c, k) / C(n, k).

    ValueError if k is not in 1..n or c is not in 0..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of each problem; there: {n}")
    if not 0 <= c <= n:
        raise ValueError(f"{c} of {n} samples correct is impossible")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> PassAtK:
    """Average pass@k over problems; `counts` holds (samples, correct samples) of each."""
    values = [pass_at_k(n, c, k) for n, c in counts]
    if not values:
        raise ValueError("pass@k of no problems")
    mean = math.fsum(values) / len(values)
    error = None
    if len(values) > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        error = math.sqrt(variance / len(values))
    return PassAtK(k, mean, error)
