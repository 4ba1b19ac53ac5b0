"""Read the files of a run folder; all are optional.

A killed run can leave a half-written last line in metrics.jsonl: it is skipped with a note. A
resumed run can write a step twice: the later line counts.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from xinslm.baseline import uninformed
from xinslm.errors import UsageError, XinslmError
from xinslm.files import read_json
from xinslm.runs import read_rows

BENCHMARK_KEYS = ("model", "against", "tasks", "samples", "speed", "settings", "notes")


@dataclass
class RunData:
    """One run folder's content."""

    folder: Path
    name: str
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl with a loss, in order of steps."""
    validation: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl with a validation_ce, in order of steps."""
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    benchmark: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    """run.json: date, machine and warnings of the training run."""
    notes: list[str] = field(default_factory=list)
    """Warnings about the folder, one sentence each."""

    @property
    def command(self) -> str | None:
        """The command that repeats this run in another folder."""
        made_by = re.search(r"Run it again with: (xinslm [\w ]+?) --config", self.config_text)
        if made_by is None:
            return None
        path = self.folder / "config.yaml"
        return f"{made_by[1]} --config {path} --output-dir {self.folder}-again"


def read_run(folder: Path) -> RunData:
    """Read a run folder. Raises UsageError if it has no file of a run, XinslmError for a broken
    file.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder; give a run folder, as `xinslm distill` writes it"
        )
    run = RunData(folder, folder.resolve().name)
    if (folder / "config.yaml").is_file():
        _read_config(run, folder / "config.yaml")
    if (folder / "metrics.jsonl").is_file():
        _read_metrics(run, folder / "metrics.jsonl")
    if (folder / "run.json").is_file():
        _read_about(run, folder / "run.json")
    run.evaluation = _checked(folder, "evaluation.json", ("bits_per_byte", "perplexity"))
    for row in run.evaluation:
        baseline = row.get("unigram_bits_per_byte")
        if warning := uninformed(row["name"], row["bits_per_byte"], baseline, "bits per byte"):
            run.notes.append(warning)
    run.benchmark = _benchmark(folder)
    run.samples = _checked(folder, "samples.json", ())
    run.files = _checked(folder, "files.json", ("bytes",))
    if not (
        run.config_text
        or run.training
        or run.validation
        or run.evaluation
        or run.benchmark
        or run.samples
        or run.files
    ):
        raise UsageError(
            f"{folder} is not a run folder: it has no config.yaml, metrics.jsonl, evaluation.json, "
            f"benchmark.json, samples.json or files.json"
        )
    return run


def _read_about(run: RunData, path: Path) -> None:
    about = read_json(path)
    if not isinstance(about, dict) or not isinstance(about.get("warnings", []), list):
        raise XinslmError(f"{path}: must be an object, with a list of 'warnings' if it has any")
    run.about = about
    run.notes += [str(warning) for warning in about.get("warnings", [])]


def _read_config(run: RunData, path: Path) -> None:
    try:
        run.config_text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(run.config_text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise XinslmError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    run.config = config if isinstance(config, dict) else {}


def _read_metrics(run: RunData, path: Path) -> None:
    data = path.read_bytes()
    lines = data.split(b"\n")
    steps: dict[str, dict[int, dict[str, Any]]] = {"loss": {}, "validation_ce": {}}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            if number == len(lines):  # no line end: the writer was interrupted
                run.notes.append(f"The last line of {path.name} is half-written and was left out.")
                continue
            raise XinslmError(
                f"{path}:{number}: not valid JSON; delete the line to make a report without it"
            ) from None
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise XinslmError(
                f"{path}:{number}: a line of metrics must be an object with an integer 'step'"
            )
        wrong = [
            k
            for k, v in values.items()
            if isinstance(v, bool) or not isinstance(v, int | float | None)
        ]
        if wrong:
            raise XinslmError(f"{path}:{number}: '{wrong[0]}' must be a number")
        for key, found in steps.items():
            if key in values:
                for later in [step for step in found if step >= values["step"]]:
                    del found[later]
                found[values["step"]] = values
    run.training, run.validation = (
        list(steps["loss"].values()),
        list(steps["validation_ce"].values()),
    )


def _benchmark(folder: Path) -> list[dict[str, Any]]:
    """Read benchmark.json, whose rows another version may have written."""
    rows = read_rows(folder, "benchmark.json")
    for row in rows:
        lacking = [key for key in BENCHMARK_KEYS if key not in row]
        if lacking:
            raise XinslmError(
                f"{folder / 'benchmark.json'}: row '{row['name']}' has no '{lacking[0]}'; run "
                "`xinslm benchmark` again"
            )
    return rows


def _checked(folder: Path, table: Any, numbers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read a table whose rows must have the given numbers, each above 0."""
    rows = read_rows(folder, table)
    for row in rows:
        for key in numbers:
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise XinslmError(
                    f"{folder / table}: row '{row['name']}' must have a number '{key}' above 0"
                )
    return rows
