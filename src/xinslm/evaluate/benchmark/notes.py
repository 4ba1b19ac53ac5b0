"""What a reader of the scores must know: cut prompts, equal choices, partial runs, items in the
training text.
"""

from collections.abc import Mapping

from xinslm.evaluate.benchmark.config import CODE, BenchmarkConfig
from xinslm.evaluate.benchmark.overlap import training_folders, words_in_common
from xinslm.evaluate.harness.run import Item, TaskScore


def notes(
    config: BenchmarkConfig,
    scores: Mapping[str, TaskScore],
    other: Mapping[str, TaskScore] | None = None,
) -> list[str]:
    """Sentences about the scores of a model, and about those of the `other` one."""
    found = []
    for name, score in scores.items():
        found += _cut(name, score, "the model's")
        if other is not None:
            found += _cut(name, other[name], "the other model's")
        if tied := sum(map(_is_tied, score.items)):
            found.append(
                f"{name}: in {tied:,} of {len(score.items):,} items another choice is exactly as "
                "likely as the right one; the first of them counts as the answer"
            )
        if score.unscored:
            found.append(f"{name}: {score.unscored}")
        if len(score.items) < score.total:
            found.append(
                f"{name}: {len(score.items):,} of {score.total:,} items, drawn at random; the "
                "interval holds the value of all items with 95 % confidence"
            )
    if CODE in scores:
        from xinslm.evaluate.code.sandbox import isolation

        found += [f"humaneval: {fact}" for fact in isolation().describe()]
    return found + _overlaps(config, scores)


def _cut(name: str, score: TaskScore, whose: str) -> list[str]:
    """A sentence about prompts that were cut, if there are any."""
    if not score.truncated:
        return []
    return [
        f"{name}: {score.truncated:,} requests lost their beginning, such as examples, because "
        f"they are longer than {whose} context"
    ]


def _is_tied(item: Item) -> bool:
    """Whether the right choice and another one are the most likely.

    Metrics take the first of equal choices. In TruthfulQA mc1 that is always the right one, so a
    model without an opinion would look good. Shares of probability (mc2) do not depend on it.
    """
    if item.right is None or item.metrics.get("acc") not in (0, 1):
        return False
    highest = max(item.log_likelihoods)
    is_best = item.log_likelihoods[item.right] == highest
    return is_best and item.log_likelihoods.count(highest) > 1


def _overlaps(config: BenchmarkConfig, scores: Mapping[str, TaskScore]) -> list[str]:
    """Items whose text is also in the datasets that trained the model or calibrated it."""
    folders = training_folders(config.model)
    if not folders:
        return []
    texts: dict[str, list[str]] = {
        name: [_text(item) for item in score.items] for name, score in scores.items()
    }
    counts = words_in_common(texts, folders)
    where = ", ".join(str(folder) for folder in folders)
    return [
        f"{name}: {count:,} of {len(texts[name]):,} items share 13 words in a row with the "
        f"training or calibration data ({where}); their scores may be memory"
        for name, count in counts.items()
        if count
    ]


def _text(item: Item) -> str:
    """The question's last part and the right choice: examples before it are not the item."""
    question = item.prompt.rpartition("\n\n")[2]
    right = item.choices[item.right] if item.right is not None and item.choices else ""
    return f"{question}{right}"
