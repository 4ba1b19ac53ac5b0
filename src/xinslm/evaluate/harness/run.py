"""Score a model on harness tasks, item by item.

`lm_eval.simple_evaluate` gives one number for a task. Here each item keeps its metrics and
log-likelihoods, so that two models can be compared on the same items, and a run may end when its
time is over: items then come in a random order, stratified by the tasks of a group.

    scores = score_tasks(lm, load_tasks(["hellaswag"], data))
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xinslm.errors import XinslmError
from xinslm.evaluate.harness.tasks import LoadedTasks, build_requests, num_docs, quiet
from xinslm.evaluate.statistics.order import stratified_order

FIRST_ITEMS = 8
"""Items from which the speed is measured if time is limited."""
SAFETY = 0.9
"""Share of the time left that the next part of a task may take by prediction."""


@dataclass(frozen=True)
class Item:
    """One question, and what the model made of it."""

    task: str
    index: int
    """Number of the item in the task's data."""
    metrics: dict[str, Any]
    """What the task's own metrics give for it; numbers, or pairs that its aggregation takes."""
    log_likelihoods: list[float] = field(default_factory=list)
    """Of each choice, nats; empty for generated answers."""
    right: int | None = None
    """Which choice is the right one."""
    right_bytes: int = 0
    """UTF-8 bytes of the right choice as it is scored, the space before it included."""
    answers: list[str] = field(default_factory=list)
    """Generated answers."""
    prompt: str = ""
    choices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskScore:
    """A task or a group of tasks on one model."""

    name: str
    version: str
    num_fewshot: int
    total: int
    """Items that the task has."""
    metrics: dict[str, float]
    """The task's own aggregation over the items that were scored."""
    items: list[Item]
    seconds: float
    truncated: int
    """Requests that lost their beginning because the context is too short."""
    strata: dict[str, int]
    """Items of each task of a group."""
    unscored: str = ""
    """How many answers have no score and why, as a sentence."""


Key = tuple[str, int]
"""A task and the number of an item in its data."""


class _Unit:
    """A task, or the tasks of a group, whose items are scored in a given order."""

    def __init__(
        self, name: str, tasks: dict[str, Any], lm: Any, seed: int, chat: bool = False
    ) -> None:
        self.name, self.tasks, self.lm, self.chat = name, tasks, lm, chat
        self.instances: dict[Key, list[Any]] = {}
        """Requests of the items whose prompts are built."""
        keys = [(name, number) for name, task in tasks.items() for number in range(num_docs(task))]
        order = stratified_order([task for task, _ in keys], seed)
        self.order = [keys[number] for number in order]
        self.done: list[Key] = []
        self.seconds, self.truncated = 0.0, 0

    def run(self, deadline: float | None = None, chosen: Sequence[Key] | None = None) -> None:
        """Score all items, those that are `chosen`, or as many as fit before `deadline`
        (`time.perf_counter`).
        """
        if chosen is not None or deadline is None:
            self.score(self.order if chosen is None else chosen)
            return
        self.score(self.order[:FIRST_ITEMS])
        while len(self.done) < len(self.order) and time.perf_counter() < deadline:
            count = self._affordable(deadline - time.perf_counter())
            if not count:
                return
            self.score(self.order[len(self.done) :][:count])

    def score(self, keys: Sequence[Key]) -> None:
        """Send the items' requests to the model."""
        began = time.perf_counter()
        cut = _send(self.lm, self.requests(keys))
        self.finish(keys, time.perf_counter() - began, cut)

    def requests(self, keys: Sequence[Key]) -> list[Any]:
        """The requests of items; their prompts are built when first asked for."""
        missing: dict[str, list[int]] = {}
        for task, number in keys:
            if (task, number) not in self.instances:
                missing.setdefault(task, []).append(number)
        lm = self.lm if self.chat else None
        for name, numbers in missing.items():
            built: dict[Key, list[Any]] = {(name, number): [] for number in numbers}
            for instance in build_requests(self.tasks[name], numbers, lm):
                built.setdefault((name, instance.doc_id), []).append(instance)
            self.instances = built | self.instances  # those that were scored stay
        return [instance for key in keys for instance in self.instances[key]]

    def finish(self, keys: Sequence[Key], seconds: float, cut: Mapping[str, int]) -> None:
        """Note that items were scored; `cut` holds truncated requests by task."""
        self.done += keys
        self.seconds += seconds
        self.truncated += sum(cut.get(name, 0) for name in self.tasks)

    def _affordable(self, seconds: float) -> int:
        """How many of the next items fit into `seconds`, by the speed so far."""
        left = self.order[len(self.done) :]
        spent = self.seconds / len(self.done)
        if any(i.request_type == "generate_until" for i in self.requests(left[:1])):
            return min(len(left), int(SAFETY * seconds / spent))
        counts = self.lm.scorer.counts
        rate = counts.computed_tokens / max(counts.seconds, 1e-9)
        budget, low, high = SAFETY * seconds * rate, 0, len(left)
        count = min(high, max(1, int(seconds / spent)))
        while low < high:  # items share tokens, so the cost of a number of items is not linear
            if self._cost(left[:count]) <= budget:
                low = count
                count = min(high, 2 * count) if high == len(left) else (low + high + 1) // 2
            else:
                high = count - 1
                count = (low + high + 1) // 2
        return low

    def _cost(self, keys: Sequence[Key]) -> int:
        """Tokens that scoring the items would compute."""
        texts = [
            instance.args
            for instance in self.requests(keys)
            if instance.request_type == "loglikelihood"
        ]
        cost: int = self.lm.scorer.cost(self.lm.pairs(texts))
        return cost

    def result(self) -> TaskScore:
        """Items and metrics of what was scored."""
        items: list[Item] = []
        values: dict[str, list[Any]] = {}
        for name, task in self.tasks.items():
            keys = sorted(key for key in self.done if key[0] == name)
            task._instances = self.requests(keys)
            if task._instances:
                task.apply_filters()
                items += self._items(name, task, values)
        first = next(iter(self.tasks.values()))
        metrics = {
            metric: float(first.aggregation()[_plain(metric)](numbers))
            for metric, numbers in values.items()
        }
        return TaskScore(
            self.name,
            str((first.config.metadata or {}).get("version", "")),
            int(first.get_config("num_fewshot") or 0),
            len(self.order),
            metrics,
            items,
            self.seconds,
            self.truncated,
            dict(Counter(name for name, _ in self.order)),
        )

    def _items(self, name: str, task: Any, values: dict[str, list[Any]]) -> Iterator[Item]:
        by_item: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_item.setdefault(instance.doc_id, []).append(instance)
        for index in sorted(by_item):
            requests = sorted(by_item[index], key=lambda r: r.idx)
            doc = requests[0].doc
            metrics: dict[str, Any] = {}
            for key in requests[0].filtered_resps:
                responses = [r.filtered_resps[key] for r in requests]
                found = _results(task, doc, responses)
                label = "" if key == "none" else f" ({key})"
                metrics |= {metric + label: value for metric, value in found.items()}
            for metric, value in metrics.items():
                values.setdefault(metric, []).append(value)
            yield _item(name, index, metrics, task, doc, requests)


def _results(task: Any, doc: Any, responses: list[Any]) -> dict[str, Any]:
    """The task's own metrics of an item, also if the probabilities of all its choices are 0.

    TruthfulQA mc2 divides probabilities by their sum. `exp` of a log-likelihood below -745 is 0,
    and 0 / 0 is NaN; the quotients do not change if all log-likelihoods are given relative to the
    highest.
    """
    with np.errstate(invalid="ignore"):
        found: dict[str, Any] = task.process_results(doc, responses)
        lost = [metric for metric, value in found.items() if _is_nan(value)]
        if lost and task.OUTPUT_TYPE == "multiple_choice":
            highest = max(value for value, _ in responses)
            relative = [(value - highest, greedy) for value, greedy in responses]
            again = task.process_results(doc, relative)
            found |= {metric: again[metric] for metric in lost}
    return found


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _item(
    name: str, index: int, metrics: dict[str, Any], task: Any, doc: Any, requests: list[Any]
) -> Item:
    prompt = str(requests[0].args[0])
    if requests[0].request_type == "generate_until":
        return Item(
            name, index, metrics, prompt=prompt, answers=[str(r.resps[0]) for r in requests]
        )
    if task.OUTPUT_TYPE != "multiple_choice":
        return Item(name, index, metrics)
    asked = [r for r in requests if r.request_type == "loglikelihood"]
    choices = [str(r.args[1]) for r in asked]
    right = task.doc_to_target(doc)
    known = isinstance(right, int) and 0 <= right < len(choices)
    return Item(
        name,
        index,
        metrics,
        [float(r.resps[0][0]) for r in asked],
        right if known else None,
        len(choices[right].encode()) if known else 0,
        prompt=prompt,
        choices=choices,
    )


def _plain(metric: str) -> str:
    """A metric's name without its filter."""
    return metric.partition(" (")[0]


def score_tasks(
    lm: Any,
    loaded: LoadedTasks,
    seconds: float | None = None,
    seed: int = 0,
    chat: bool = False,
    chosen: Mapping[str, Sequence[Key]] | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> list[TaskScore]:
    """Score a model on tasks.

    Args:
        lm: A `XinslmLM`.
        loaded: Tasks and groups; tasks of a group become one score.
        seconds: Time for all tasks, shared evenly; None for all items.
        seed: Of the order of the items.
        chat: Whether prompts are rendered with the model's chat template.
        chosen: The items to score, by the name of the task or group; not with `seconds`.
        tell: Receives the name of each task or group before it is scored.

    XinslmError if a log-likelihood is not finite.
    """
    found, began = [], time.perf_counter()
    units = list(units_of(loaded).items())
    for number, (name, tasks) in enumerate(units):
        unit = _Unit(name, tasks, lm, seed, chat)
        found.append(unit)
        if seconds is not None:
            tell(name)
            now = time.perf_counter()
            unit.run(now + max(0.0, began + seconds - now) / (len(units) - number))
    if seconds is None:
        tell(", ".join(name for name, _ in units))
        _score_together(lm, found, chosen)
    with quiet():
        return [unit.result() for unit in found]


def _score_together(
    lm: Any, units: Sequence[_Unit], chosen: Mapping[str, Sequence[Key]] | None
) -> None:
    """Score all units in one call, because tasks share texts; time is split by their requests."""
    keys = [unit.order if chosen is None else chosen[unit.name] for unit in units]
    parts = [unit.requests(part) for unit, part in zip(units, keys, strict=True)]
    began = time.perf_counter()
    cut = _send(lm, [instance for part in parts for instance in part])
    spent = (time.perf_counter() - began) / max(1, sum(map(len, parts)))
    for unit, part, requests in zip(units, keys, parts, strict=True):
        unit.finish(part, spent * len(requests), cut)


def _send(lm: Any, instances: Sequence[Any]) -> Counter[str]:
    """Send requests to the model, all of a kind at once, and store the responses; return how many
    lost their beginning, by task.
    """
    cut: Counter[str] = Counter()
    kinds: dict[str, list[Any]] = {}
    for instance in instances:
        kinds.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
    for kind, requests in kinds.items():
        responses = getattr(lm, kind)(requests)
        for request, response in zip(requests, responses, strict=True):
            _require_finite(request, response)
            request.resps.append(response)
        cut += Counter(requests[number].task_name for number in lm.truncated)
    return cut


def _require_finite(request: Any, response: Any) -> None:
    value = response[0] if isinstance(response, tuple) else response
    if isinstance(value, float) and not math.isfinite(value):
        raise XinslmError(
            f"{request.task_name} item {request.doc_id}: the log-likelihood is {value}. The "
            "model's weights are damaged or its numbers overflow (try --dtype float32); its "
            "scores would mean nothing"
        )


def units_of(loaded: LoadedTasks) -> dict[str, dict[str, Any]]:
    """The largest groups whose tasks have the same metrics, then single tasks."""
    units: dict[str, dict[str, Any]] = {}
    placed: set[str] = set()
    for group, names in sorted(loaded.groups.items(), key=lambda entry: -len(entry[1])):
        metrics = {frozenset(loaded.tasks[name].aggregation()) for name in names}
        if len(metrics) == 1 and not placed & set(names):
            units[group] = {name: loaded.tasks[name] for name in names}
            placed |= set(names)
    return units | {name: {name: task} for name, task in loaded.tasks.items() if name not in placed}
