"""What a reader of the scores must know: cut prompts, partial runs, items in the training text."""

from collections.abc import Mapping
from typing import Any

from xinslm.evaluate.benchmark.config import CODE, BenchmarkConfig
from xinslm.evaluate.benchmark.overlap import training_folders, words_in_common
from xinslm.evaluate.harness.run import TaskScore


def notes(config: BenchmarkConfig, scores: Mapping[str, TaskScore]) -> list[str]:
    """Sentences about the scores of a model."""
    found = []
    for name, score in scores.items():
        if score.truncated:
            found.append(
                f"{name}: {score.truncated:,} requests lost their beginning, such as examples, "
                "because they are longer than the model's context"
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


def _overlaps(config: BenchmarkConfig, scores: Mapping[str, TaskScore]) -> list[str]:
    """Items whose text is also in the datasets that trained the model or calibrated it."""
    folders = training_folders(config.model)
    if not folders:
        return []
    texts: dict[str, list[Any]] = {
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


def _text(item: Any) -> str:
    """The question's last part and the right choice: examples before it are not the item."""
    question = item.prompt.rpartition("\n\n")[2]
    right = item.choices[item.right] if item.right is not None and item.choices else ""
    return f"{question}{right}"
