"""Tasks whose answers the model writes and xinslm scores: HumanEval, IFEval, the user's own.

A task is a list of prompts, and a function that scores the answers of some of them. Items come in
random order, in batches, so that a time limit leaves a random sample.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from xinslm.errors import XinslmError
from xinslm.evaluate.harness.run import Item, TaskScore
from xinslm.evaluate.statistics import stratified_order

BATCH = 64
"""Answers that are written together; the time is looked at between batches."""
FIRST_BATCH = 8
"""The same for the first ones, if time is limited."""

Prompt = str | list[dict[str, str]]
Scores = list[dict[str, float | list[float]] | None]
"""Metrics of each answer, numbers from 0 to 1 or lists of them; None for one without a score."""


@dataclass(frozen=True)
class Written:
    """A task of prompts."""

    name: str
    prompts: Sequence[Prompt]
    score: Callable[[Sequence[int], Sequence[str]], Scores]
    """From numbers of prompts and their answers to the metrics of each."""
    until: tuple[str, ...] = ()
    """Strings that end an answer."""
    unscored: str = ""
    """Why answers may have no score."""


def write_and_score(
    lm: Any,
    task: Written,
    max_new_tokens: int,
    seed: int,
    seconds: float | None = None,
    chosen: Sequence[int] | None = None,
) -> TaskScore:
    """Let a model answer prompts and score the answers.

    Args:
        lm: A `XinslmLM`.
        task: What to answer.
        max_new_tokens: Longest answer.
        seed: Of the order of the prompts.
        seconds: Time for it; None for all prompts.
        chosen: Numbers of the prompts to answer, instead.
    """
    began = time.perf_counter()
    left = list(chosen or stratified_order([0] * len(task.prompts), seed).tolist())
    limited = seconds is not None and chosen is None
    batch, items, asked, cut = FIRST_BATCH if limited else BATCH, [], 0, 0
    while left:
        part, left = left[:batch], left[batch:]
        items += _answer(lm, task, part, max_new_tokens)
        asked += len(part)
        cut += len(lm.truncated)
        spent = time.perf_counter() - began
        batch = BATCH
        if limited and seconds is not None:
            batch = min(BATCH, int((seconds - spent) / spent * asked))
            left = left if batch > 0 else []
    if not items:
        raise XinslmError(f"{task.name}: none of {asked} answers has a score: {task.unscored}")
    items.sort(key=lambda item: item.index)
    total = len(task.prompts) - (asked - len(items))
    return TaskScore(
        name=task.name,
        version="",
        num_fewshot=0,
        total=total,
        metrics=means(items),
        items=items,
        seconds=time.perf_counter() - began,
        truncated=cut,
        strata={task.name: total},
        unscored=f"{asked - len(items)} answers have no score: {task.unscored}"
        if asked > len(items)
        else "",
    )


def means(items: Sequence[Item]) -> dict[str, float]:
    """Mean of each metric over the items that have it; lists are joined first."""
    names = list(dict.fromkeys(name for item in items for name in item.metrics))
    values = {
        name: [np.ravel(item.metrics[name]) for item in items if name in item.metrics]
        for name in names
    }
    return {name: float(np.concatenate(found).mean()) for name, found in values.items()}


def _answer(lm: Any, task: Written, numbers: Sequence[int], max_new_tokens: int) -> list[Item]:
    texts = [_text(lm, task.prompts[number]) for number in numbers]
    settings = {"until": list(task.until), "max_gen_toks": max_new_tokens, "do_sample": False}
    answers = lm.generate_until([SimpleNamespace(args=(text, settings)) for text in texts])
    scores = task.score(numbers, answers)
    return [
        Item(task.name, number, dict(metrics), answers=[answer], prompt=text)
        for number, metrics, answer, text in zip(numbers, scores, answers, texts, strict=True)
        if metrics is not None
    ]


def _text(lm: Any, prompt: Prompt) -> str:
    """A prompt as the model reads it: a chat by its template, if it has one."""
    if isinstance(prompt, str):
        return prompt
    if lm.tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in prompt)
    text: str = lm.apply_chat_template(prompt)
    return text
