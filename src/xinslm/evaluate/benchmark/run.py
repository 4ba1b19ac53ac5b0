"""The command `xinslm benchmark`: tasks, speed and memory of a model, next to another one.

xinslm benchmark student --tasks hellaswag mmlu --data bench --against teacher --run runs/student
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError
from xinslm.evaluate.benchmark.config import BenchmarkConfig
from xinslm.evaluate.benchmark.describe import describe
from xinslm.evaluate.harness.start import no_collection
from xinslm.evaluate.journal import Journal, kept
from xinslm.files import write_json
from xinslm.machine import environment
from xinslm.progress import Listener, Progress, ignore


@dataclass(frozen=True)
class Result:
    """Everything that was measured, as JSON holds it."""

    name: str
    model: dict[str, Any]
    """Name, kind, parameters, bytes of the weight file, context; without tasks the path alone."""
    against: dict[str, Any] | None = None
    """The same of the other model."""
    tasks: list[dict[str, Any]] = field(default_factory=list)
    """A row for each metric of each task (`rows.py`)."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Some items of each task, those that the models disagree on first."""
    speed: list[dict[str, Any]] = field(default_factory=list)
    """A row for each model and engine (`speed/result.py`)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the values depend on: type, seed, time limit, hashes of the tasks' files."""
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a reader must know, a sentence each."""
    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """All items of each task; not in the run folder."""

    def row(self) -> dict[str, Any]:
        """The row for benchmark.json."""
        return {key: value for key, value in asdict(self).items() if key != "items"}

    def describe(self) -> str:
        """Tables for the terminal."""
        return describe(self.row())


def run(config: BenchmarkConfig, on_progress: Listener = ignore) -> Result:
    """Score a model on tasks and measure its speed; UsageError if something is missing."""
    with no_collection():  # imports PyTorch
        from xinslm.device import pick_device
        from xinslm.runs import add_row, require_run, row_name

    config.check()
    if config.output_path is not None and config.output_path.exists() and not config.force:
        raise UsageError(f"{config.output_path} exists; pass --force to replace it")
    if config.run is not None:
        require_run(config.run)
    with kept(config.journal_path) as journal:
        measured = _tasks(config, on_progress, journal) if config.tasks else _paths(config)
        result = Result(
            name=config.name or row_name(config.model, config.activations),
            speed=_speed(config, on_progress) if config.speed else [],
            environment=environment(pick_device(config.device)),
            **measured,
        )
    if config.output_path is not None:
        write_json(config.output_path, asdict(result))
    if config.run is not None:
        add_row(config.run, "benchmark.json", result.row())
    if journal is not None:
        journal.remove()
    return result


def _paths(config: BenchmarkConfig) -> dict[str, Any]:
    other = config.against
    return {
        "model": {"name": config.model.name, "path": str(config.model)},
        "against": None if other is None else {"name": other.name, "path": str(other)},
    }


def _tasks(
    config: BenchmarkConfig, on_progress: Listener, journal: Journal | None
) -> dict[str, Any]:
    """Scores of the model, and of the other one on the same items."""
    on_progress(Progress("read tasks"))
    with no_collection():
        from xinslm.evaluate.benchmark.models import open_tasks, score_model
        from xinslm.evaluate.benchmark.notes import notes
        from xinslm.evaluate.benchmark.rows import sample, samples, task_rows

        tasks = open_tasks(config)
    seconds = None if config.max_minutes is None else 60 * config.max_minutes
    other, chosen = None, None
    if config.against is not None:
        half = None if seconds is None else seconds / 2
        other = score_model(config.against, tasks, config, on_progress, half, journal=journal)
        chosen = {
            name: [(item.task, item.index) for item in score.items]
            for name, score in other.scores.items()
        }
    limit = seconds if chosen is None else None  # the same items, whatever they take
    own = score_model(
        config.model, tasks, config, on_progress, limit, chosen, config.activations, journal
    )
    pairs = {
        name: (score, other.scores[name] if other else None) for name, score in own.scores.items()
    }
    return {
        "model": own.facts,
        "against": other.facts if other else None,
        "tasks": [row for pair in pairs.values() for row in task_rows(*pair, config.seed)],
        "samples": {name: samples(*pair) for name, pair in pairs.items()},
        "items": {
            name: [sample(item, None) for item in score.items] for name, (score, _) in pairs.items()
        },
        "settings": {
            "dtype": config.dtype,
            "activations": config.activations,
            "seed": config.seed,
            "max_minutes": config.max_minutes,
            "apply_chat_template": config.apply_chat_template,
            "files": tasks.files,
        },
        "notes": notes(config, own.scores, other.scores if other else None) + _reused(journal),
    }


def _reused(journal: Journal | None) -> list[str]:
    if journal is None or not journal.reused:
        return []
    return [
        f"{journal.reused:,} answers are those of an earlier run that was stopped; the seconds of "
        "the tasks do not include them"
    ]


def _speed(config: BenchmarkConfig, on_progress: Listener) -> list[dict[str, Any]]:
    from xinslm.evaluate.speed.config import SpeedConfig
    from xinslm.evaluate.speed.run import measure

    models: tuple[Path, ...] = tuple(
        path for path in (config.model, config.against) if path is not None
    )
    return [result.to_dict() for result in measure(SpeedConfig(models), on_progress)]
