"""The tasks of `written.py` by name, with their data from a folder or the Hub."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xinslm.errors import UsageError
from xinslm.evaluate.benchmark.config import CODE, INSTRUCTIONS, OWN_TASKS, BenchmarkConfig
from xinslm.evaluate.benchmark.instructions import ifeval_task, own_task
from xinslm.evaluate.benchmark.written import Scores, Written
from xinslm.evaluate.code import humaneval
from xinslm.evaluate.harness.local_data import LocalDatasets

HUB = {CODE: ("openai/openai_humaneval", "test"), INSTRUCTIONS: ("google/IFEval", "train")}
"""Dataset and split of a task on the Hub."""


def is_written(name: str) -> bool:
    """Whether a task's name is one of this module's."""
    return name in HUB or name.endswith(OWN_TASKS)


def open_task(name: str, config: BenchmarkConfig) -> Written:
    """Read a task's prompts; UsageError if its data is missing."""
    if name.endswith(OWN_TASKS):
        return own_task(Path(name), config)
    with tempfile.TemporaryDirectory() as scratch:
        path = _file(name, config.data, Path(scratch))
        return humaneval_task(path) if name == CODE else ifeval_task(path)


def humaneval_task(path: Path) -> Written:
    """The functions of HumanEval; completions are run."""
    problems = humaneval.read_problems(path)
    options = humaneval.RunOptions()

    def score(numbers: Sequence[int], answers: Sequence[str]) -> Scores:
        nonlocal options
        asked = [problems[number] for number in numbers]
        completions = {
            problem.task_id: [humaneval.truncate(answer)]
            for problem, answer in zip(asked, answers, strict=True)
        }
        result = humaneval.run_completions(asked, completions, options, allow=True)
        options = replace(options, limits=result.limits)  # measured once
        return [{"pass@1": float(problem.num_passed)} for problem in result.problems]

    prompts = [problem.prompt for problem in problems]
    return Written(CODE, prompts, score, humaneval.STOP_STRINGS)


def _file(name: str, data: Path | None, scratch: Path) -> Path:
    """The task's file in the folder `data`, or one made in `scratch` of the Hub's rows."""
    if data is not None:
        files = LocalDatasets(data).files
        found = [files[stem] for stem in (name, f"{name}test", f"{name}train") if stem in files]
        if not found:
            raise UsageError(f"{data} has no data of {name}: put {name}.jsonl there")
        return found[0]
    import datasets

    dataset, split = HUB[name]
    path = scratch / f"{name}.jsonl"
    try:
        datasets.load_dataset(dataset, split=split).to_json(str(path))
    except Exception as error:  # of requests, huggingface_hub and datasets
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"the data of {name} ({dataset}) cannot be downloaded: {first}. Go online, or put "
            f"{name}.jsonl into a folder and give it as --data"
        ) from error
    return path
