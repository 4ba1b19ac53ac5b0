"""Tasks that xinslm scores itself, from answers that the model writes: HumanEval, IFEval and
instructions of the user's own.

Each is a list of prompts, and a function that scores the answers of some of them. Items come in
random order, in batches, so that a time limit leaves a random sample.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from xinslm.errors import UsageError
from xinslm.evaluate.benchmark.config import CODE, INSTRUCTIONS, OWN_TASKS, BenchmarkConfig
from xinslm.evaluate.benchmark.instructions import ifeval_task, own_task
from xinslm.evaluate.code import humaneval
from xinslm.evaluate.harness.local_data import LocalDatasets
from xinslm.evaluate.harness.run import Item, TaskScore
from xinslm.evaluate.statistics import stratified_order

BATCH = 64
"""Answers that are written together; the time is looked at between batches."""
HUB = {CODE: ("openai/openai_humaneval", "test"), INSTRUCTIONS: ("google/IFEval", "train")}
"""Dataset and split of a task on the Hub."""

Prompt = str | list[dict[str, str]]
Scores = list[dict[str, float]]


@dataclass(frozen=True)
class Written:
    """A task of prompts."""

    name: str
    prompts: Sequence[Prompt]
    score: Callable[[Sequence[int], Sequence[str]], Scores]
    """From numbers of prompts and their answers to the metrics of each."""
    until: tuple[str, ...] = ()
    """Strings that end an answer."""


def is_written(name: str) -> bool:
    """Whether a task's name is one of this module's."""
    return name in (CODE, INSTRUCTIONS) or name.endswith(OWN_TASKS)


def open_task(name: str, config: BenchmarkConfig) -> Written:
    """Read a task's prompts; UsageError if its data is missing."""
    if name.endswith(OWN_TASKS):
        return own_task(Path(name), config)
    with tempfile.TemporaryDirectory() as scratch:
        path = _file(name, config.data, Path(scratch))
        return _humaneval(path) if name == CODE else ifeval_task(path)


def write_and_score(
    lm: Any,
    task: Written,
    config: BenchmarkConfig,
    seconds: float | None = None,
    chosen: Sequence[int] | None = None,
) -> TaskScore:
    """Let a model answer the prompts and score the answers.

    Args:
        lm: A `XinslmLM`.
        task: What to answer.
        config: Length of answers and seed.
        seconds: Time for it; None for all prompts.
        chosen: Numbers of the prompts to answer, instead.
    """
    began = time.perf_counter()
    order = stratified_order([0] * len(task.prompts), config.seed).tolist()
    left = list(order if chosen is None else chosen)
    items: list[Item] = []
    batch = BATCH if seconds is None or chosen is not None else BATCH // 8
    while left:
        part, left = left[:batch], left[batch:]
        items += _answer(lm, task, part, config.max_new_tokens)
        spent = time.perf_counter() - began
        if seconds is not None and chosen is None:
            affordable = int((seconds - spent) * 0.9 / spent * len(items))
            batch, left = min(BATCH, affordable), left if affordable > 0 else []
    items.sort(key=lambda item: item.index)
    names = list(items[0].metrics)
    metrics = {name: float(np.mean([item.metrics[name] for item in items])) for name in names}
    total, spent = len(task.prompts), time.perf_counter() - began
    return TaskScore(task.name, "", 0, total, metrics, items, spent, 0, {task.name: total})


def _answer(lm: Any, task: Written, numbers: Sequence[int], max_new_tokens: int) -> list[Item]:
    texts = [_text(lm, task.prompts[number]) for number in numbers]
    settings = {"until": list(task.until), "max_gen_toks": max_new_tokens, "do_sample": False}
    requests = [SimpleNamespace(args=(text, settings)) for text in texts]
    answers = lm.generate_until(requests)
    scores = task.score(numbers, answers)
    return [
        Item(task.name, number, metrics, answers=[answer], prompt=text)
        for number, metrics, answer, text in zip(numbers, scores, answers, texts, strict=True)
    ]


def _text(lm: Any, prompt: Prompt) -> str:
    """A prompt as the model reads it: a chat by its template, if it has one."""
    if isinstance(prompt, str):
        return prompt
    if lm.tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in prompt)
    text: str = lm.apply_chat_template(prompt)
    return text


def _humaneval(path: Path) -> Written:
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
