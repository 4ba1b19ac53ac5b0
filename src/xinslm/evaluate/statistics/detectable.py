"""The smallest difference that a benchmark of n items can show.

A difference of this size is found significant (two-sided, 5 %) in 80 % of repetitions with other
items; smaller ones are missed more often than that. With z_a = z(1 - alpha/2) and z_b = z(power) it
is (z_a + z_b) times the standard error of the difference, 2.80 times by default (Cohen 1988;
Miller, arXiv:2411.00640).
"""

import math

from xinslm.errors import XinslmError
from xinslm.evaluate.statistics.distributions import normal_quantile

ALPHA, POWER = 0.05, 0.8


def detectable_from_error(
    standard_error: float, alpha: float = ALPHA, power: float = POWER
) -> float:
    """(z_a + z_b) times the standard error of a difference, for any score."""
    if not (math.isfinite(standard_error) and standard_error >= 0):
        raise XinslmError(f"standard error {standard_error}: a finite number from 0 is needed")
    return sum(_quantiles(alpha, power)) * standard_error


def detectable_unpaired(
    accuracy: float, num_items: int, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Between two models of about this accuracy, each measured on n items of its own.

    (z_a + z_b) sqrt(2 q (1 - q) / n) with q = (n accuracy + 2) / (n + 4) (Agresti and Coull 1998),
    so that an accuracy of 0 or 1 leaves something to detect. At most 1.
    """
    _require_items(num_items)
    _require_share(accuracy, "accuracy")
    q = (num_items * accuracy + 2) / (num_items + 4)
    return min(1.0, detectable_from_error(math.sqrt(2 * q * (1 - q) / num_items), alpha, power))


def detectable_paired(
    discordance: float, num_items: int, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Between the accuracies of two models on the same n items.

    `discordance` is the share of items that exactly one of them answers right. It is the d with

        d sqrt(n) = z_a sqrt(D) + z_b sqrt(D - d^2),    D = max(discordance, d)

    (Connor 1987, for McNemar's test): a difference d takes at least that many items that one model
    alone answers right. At most 1.
    """
    _require_items(num_items)
    _require_share(discordance, "discordance")
    z_a, z_b = _quantiles(alpha, power)

    def detected(difference: float) -> bool:
        items = max(discordance, difference)
        needed = z_a * math.sqrt(items) + z_b * math.sqrt(items - difference**2)
        return difference * math.sqrt(num_items) >= needed

    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if detected(middle) else (middle, high)
    return high


def _quantiles(alpha: float, power: float) -> tuple[float, float]:
    if not 0 < alpha < 1 or not 0.5 <= power < 1:
        raise XinslmError(
            f"alpha {alpha}, power {power}: alpha is between 0 and 1, power from 0.5 to below 1"
        )
    return normal_quantile(1 - alpha / 2), normal_quantile(power)


def _require_items(num_items: int) -> None:
    if num_items < 1:
        raise XinslmError("a detectable difference needs at least one item; there is none")


def _require_share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise XinslmError(f"{name} {value}: a share from 0 to 1 is needed")
