"""IFEval and instructions of the user's own as tasks that the model writes answers for."""

from collections.abc import Sequence
from pathlib import Path

from xinslm.evaluate.benchmark.config import INSTRUCTIONS, BenchmarkConfig
from xinslm.evaluate.benchmark.written import Scores, Written
from xinslm.evaluate.instructions import custom, ifeval
from xinslm.evaluate.instructions.judge import EndpointJudge
from xinslm.teachers.endpoint_config import EndpointConfig


def ifeval_task(path: Path) -> Written:
    """The prompts of IFEval; metrics are named as in lm-evaluation-harness."""
    items = ifeval.read_items(path)

    def score(numbers: Sequence[int], answers: Sequence[str]) -> Scores:
        result = ifeval.score([items[number] for number in numbers], answers)
        return [
            None
            if None in row.strict
            else {
                "prompt_level_strict_acc": float(all(row.strict)),
                "prompt_level_loose_acc": float(all(row.loose)),
                "inst_level_strict_acc": [float(bool(x)) for x in row.strict],
                "inst_level_loose_acc": [float(bool(x)) for x in row.loose],
            }
            for row in result.items
        ]

    why = "the language of an answer needs the package langdetect"
    return Written(INSTRUCTIONS, [list(item.prompt) for item in items], score, unscored=why)


def own_task(path: Path, config: BenchmarkConfig) -> Written:
    """Instructions of a JSONL file (docs/tasks.md)."""
    items = custom.read_items(path)
    judge = None
    if config.judge is not None:
        judge = EndpointJudge(config.judge, EndpointConfig(model=config.judge_model))

    def score(numbers: Sequence[int], answers: Sequence[str]) -> Scores:
        result = custom.score([items[number] for number in numbers], answers, judge)
        scores: Scores = []
        for row in result.items:
            if row.score is None:
                scores.append(None)
                continue
            scores.append({"score": row.score, f"score ({row.item.category})": row.score})
        return scores

    why = "a check needs the package langdetect, or no judge gave a grade (--judge)"
    return Written(path.name, [list(item.prompt) for item in items], score, unscored=why)
