"""Score a model on all tasks of a benchmark."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError
from xinslm.evaluate.benchmark.config import BenchmarkConfig
from xinslm.evaluate.benchmark.generated import is_written, open_task
from xinslm.evaluate.benchmark.written import Written, write_and_score
from xinslm.evaluate.harness.run import TaskScore
from xinslm.evaluate.journal import Journal
from xinslm.progress import Listener, Progress
from xinslm.ranges import Activations
from xinslm.runs import row_name


@dataclass(frozen=True)
class Tasks:
    """What to score a model on."""

    harness: Any
    """`LoadedTasks`, or None."""
    written: list[Written]
    num_units: int
    """Tasks, and groups of tasks, that share the time."""
    files: dict[str, str]
    """SHA-256 of the files that the items came from, by name."""


@dataclass(frozen=True)
class ModelScores:
    """A model's scores."""

    facts: dict[str, Any]
    scores: dict[str, TaskScore] = field(default_factory=dict)
    """By the name of the task or group."""


def open_tasks(config: BenchmarkConfig) -> Tasks:
    """Load all tasks; UsageError for unknown names and missing data."""
    names = [name for name in config.tasks if not is_written(name)]
    written = [open_task(name, config) for name in config.tasks if is_written(name)]
    files = {
        name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
        for name in config.tasks
        if name.endswith(".jsonl")
    }
    if not names:
        return Tasks(None, written, len(written), files)
    require_harness()
    from xinslm.evaluate.harness.run import units_of
    from xinslm.evaluate.harness.tasks import load_tasks

    loaded = load_tasks(names, config.data)
    return Tasks(loaded, written, len(units_of(loaded)) + len(written), loaded.files | files)


def require_harness() -> None:
    """UsageError with the install command if lm-evaluation-harness is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"benchmark tasks need lm-evaluation-harness ({error}): pip install 'xinslm[eval]'"
        ) from None


def score_model(
    path: Path,
    tasks: Tasks,
    config: BenchmarkConfig,
    on_progress: Listener,
    seconds: float | None = None,
    chosen: Mapping[str, Sequence[tuple[str, int]]] | None = None,
    activations: Activations = "float",
    journal: Journal | None = None,
) -> ModelScores:
    """Score a model on tasks: on all items, on those that fit into `seconds`, or on `chosen`.

    Answers in `journal` are not asked for again; new ones are added to it.
    """
    require_harness()
    from xinslm.evaluate.harness.model import XinslmLM
    from xinslm.evaluate.harness.run import score_tasks

    on_progress(Progress(f"load {path.name}"))
    lm = XinslmLM(
        str(path),
        config.device,
        config.dtype,
        max_length=config.max_seq_length,
        batch_tokens=config.batch_tokens,
        activations=activations,
    )
    lm.journal = journal
    facts = {
        "name": row_name(path, activations),
        "path": str(path),
        **lm.facts,
        "context": lm.max_length,
    }
    label = ""

    def begin(name: str) -> None:
        nonlocal label
        label = f"{name}, {path.name}"
        on_progress(Progress(label))

    lm.tell = lambda done, total, unit: on_progress(Progress(label, done, total, unit))
    scores: list[TaskScore] = []
    share = None if seconds is None else seconds / tasks.num_units
    if tasks.harness is not None:
        count = tasks.num_units - len(tasks.written)
        scores += score_tasks(
            lm,
            tasks.harness,
            None if share is None else share * count,
            config.seed,
            config.apply_chat_template,
            chosen,
            begin,
        )
    for task in tasks.written:
        begin(task.name)
        wanted = None if chosen is None else [number for _, number in chosen[task.name]]
        scores.append(write_and_score(lm, task, config.max_new_tokens, config.seed, share, wanted))
    return ModelScores(facts, {score.name: score for score in scores})
