"""A task's scores as a row of the results: value, intervals, and the comparison with another model.

A row answers two questions apart: which interval holds the value of all items, if only a part was
scored (`full_set`), and how far the value would move with other items of the same kind
(`standard_error`, as the harness gives it, and `interval`).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from xinslm.errors import XinslmError
from xinslm.evaluate.benchmark.written import means
from xinslm.evaluate.harness.run import Item, TaskScore
from xinslm.evaluate.statistics import (
    bits_per_byte,
    compare_answers,
    compare_scores,
    detectable_from_error,
    detectable_paired,
    detectable_unpaired,
    full_set_estimate,
    generalisation_interval,
    group_mean_score,
    mean_score,
    retained_share,
)

CHANCE_METRICS = ("acc", "acc_norm", "acc_bytes")
"""Metrics for which a guess among the choices is right by chance."""
MOST_SAMPLES = 8


@dataclass(frozen=True)
class Pairing:
    """One metric of two models on the same items."""

    own: np.ndarray
    other: np.ndarray
    chance: np.ndarray
    """What a guess scores, for each item."""


def task_rows(score: TaskScore, other: TaskScore | None, seed: int) -> list[dict[str, Any]]:
    """A row for each metric of a task, compared with the other model's score on the same items."""
    if other is not None:
        score, other = _common(score, other)
    return [_row(score, other, metric, value, seed) for metric, value in score.metrics.items()]


def _common(score: TaskScore, other: TaskScore) -> tuple[TaskScore, TaskScore]:
    """Both scores on the items that both models have one for: a judge may have graded only one of
    two answers. Raises XinslmError if there are none.
    """
    keys = [{(item.task, item.index) for item in side.items} for side in (score, other)]
    both = keys[0] & keys[1]
    if keys[0] == keys[1]:
        return score, other
    if not both:
        raise XinslmError(f"{score.name}: no item has a score for both models")
    first, second = (
        [item for item in side.items if (item.task, item.index) in both] for side in (score, other)
    )
    return (
        replace(score, items=first, metrics=means(first)),
        replace(other, items=second, metrics=means(second)),
    )


def _row(
    score: TaskScore, other: TaskScore | None, metric: str, value: float, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": score.name,
        "version": score.version,
        "num_fewshot": score.num_fewshot,
        "metric": metric,
        "value": value,
        "items": len(score.items),
        "total": score.total,
        "truncated": score.truncated,
        "seconds": score.seconds,
    }
    values = _numbers(score.items, metric)
    if values is None:
        return row | ({"other": {"value": other.metrics[metric]}} if other else {})
    row |= _uncertainty(score, values)
    row["bits_per_byte"] = _bits(score, seed)
    chance = _chance(score.items, metric, values)
    row["chance"] = float(chance.mean())
    if other is not None:
        pairing = Pairing(values, _require(_numbers(other.items, metric)), chance)
        row["other"] = _comparison(pairing, score, other, metric, seed)
    return row


def _numbers(items: Sequence[Item], metric: str) -> np.ndarray | None:
    """A metric of each item, float64 (n,); None if they are not numbers from 0 to 1, or not all
    items have it.
    """
    found = [item.metrics.get(metric) for item in items]
    if not all(isinstance(x, int | float | np.number) and 0 <= x <= 1 for x in found):
        return None
    return np.array(found, np.float64)


def _require(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "both models have the same metrics"
    return values


def _chance(items: list[Item], metric: str, values: np.ndarray) -> np.ndarray:
    """What a guess among the choices scores, for each item; 0 where that is not defined."""
    if metric.partition(" ")[0] not in CHANCE_METRICS or not np.isin(values, (0, 1)).all():
        return np.zeros(len(items))
    return np.array([1 / len(i.choices) if i.right is not None else 0.0 for i in items])


def _uncertainty(score: TaskScore, values: np.ndarray) -> dict[str, Any]:
    names = [item.task for item in score.items]
    several = len(score.strata) > 1
    mean = group_mean_score(values, names) if several else mean_score(values)
    found: dict[str, Any] = {
        "standard_error": mean.standard_error,
        "interval": _ends(generalisation_interval(values)),
        "detectable": detectable_unpaired(mean.mean, len(values)),
    }
    if len(values) < score.total:
        sizes: dict[Hashable, int] = dict(score.strata.items())
        estimate = full_set_estimate(values, names, sizes)
        found |= {"full_set": {"value": estimate.mean, "interval": _ends(estimate.interval)}}
    return found


def _bits(score: TaskScore, seed: int) -> dict[str, Any] | None:
    """Bits per byte of the right choices; None for tasks without choices."""
    known = [item for item in score.items if item.right is not None]
    if not known:
        return None
    nats, sizes = _right(known), np.array([item.right_bytes for item in known])
    found = bits_per_byte(nats, sizes, seed=seed)
    return {"value": found.value, "interval": _ends(found.generalisation_interval)}


def _right(items: list[Item]) -> np.ndarray:
    """Log-likelihood of the right choice of each item; at most 0, which rounding can exceed."""
    found = [min(0.0, item.log_likelihoods[item.right or 0]) for item in items]
    return np.array(found, np.float64)


def _comparison(
    pairing: Pairing, score: TaskScore, other: TaskScore, metric: str, seed: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"value": other.metrics[metric]}
    if np.isin(np.concatenate([pairing.own, pairing.other]), (0, 1)).all():
        answers = compare_answers(pairing.own, pairing.other, seed=seed)
        found |= {
            "difference": answers.difference,
            "interval": _ends(answers.interval),
            "p_value": answers.p_value,
            "only_own_right": answers.only_first_right,
            "only_other_right": answers.only_second_right,
            "detectable": detectable_paired(answers.discordance, answers.num_items),
        }
    else:
        scores = compare_scores(pairing.own, pairing.other, seed=seed)
        error = scores.standard_error
        found |= {
            "difference": scores.difference,
            "interval": _ends(scores.interval),
            "p_value": scores.p_value,
            "detectable": detectable_from_error(error) if error else None,
        }
    for name, chance in (("retained", np.zeros(1)), ("retained_above_chance", pairing.chance)):
        level = chance if len(chance) > 1 else float(chance[0])
        share = retained_share(pairing.own, pairing.other, level, seed=seed)
        found[name] = None if share is None else asdict(share)
    return found | {"bits_per_byte": _bits_comparison(score, other, seed)}


def _bits_comparison(score: TaskScore, other: TaskScore, seed: int) -> dict[str, Any] | None:
    pairs = [(a, b) for a, b in zip(score.items, other.items, strict=True) if a.right is not None]
    if not pairs:
        return None
    sizes = np.array([a.right_bytes for a, _ in pairs], np.float64)
    own, others = (-_right(list(side)) / math.log(2) / sizes for side in zip(*pairs, strict=True))
    found = compare_scores(own, others, sizes, seed=seed)
    return {
        "value": float((others * sizes).sum() / sizes.sum()),
        "difference": found.difference,
        "interval": _ends(found.interval),
        "p_value": found.p_value,
    }


def _ends(interval: Any) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def samples(score: TaskScore, other: TaskScore | None) -> list[dict[str, Any]]:
    """Items to look at: those that only one of the models answers right first, then others."""
    metric = next(iter(score.metrics))
    others = {(item.task, item.index): item for item in other.items} if other else {}

    def rank(item: Item) -> tuple[int, int]:
        partner = others.get((item.task, item.index))
        same = partner is None or partner.metrics.get(metric) == item.metrics.get(metric)
        return int(same), item.index

    flips = sorted(score.items, key=rank)
    lost = [i for i in flips if not rank(i)[0] and not i.metrics.get(metric)]
    won = [i for i in flips if not rank(i)[0] and i.metrics.get(metric)]
    rest = [i for i in flips if rank(i)[0]]
    count = MOST_SAMPLES // 3
    chosen = [*lost[:count], *won[:count]]
    chosen += rest[: MOST_SAMPLES - len(chosen)]
    return [sample(item, others.get((item.task, item.index))) for item in chosen]


def sample(item: Item, other: Item | None) -> dict[str, Any]:
    """An item as JSON holds it, with both models' log-likelihoods or answers."""
    found = {key: value for key, value in asdict(item).items() if value not in ([], "", None)}
    found["metrics"] = {key: _plain(value) for key, value in item.metrics.items()}
    if other is not None:
        found["other"] = {
            "metrics": {key: _plain(value) for key, value in other.metrics.items()},
            "log_likelihoods": other.log_likelihoods,
            "answers": other.answers,
        }
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value
