"""HumanEval: runs generated code against tests (Chen et al., arXiv:2107.03374).

A program is the prompt, the completion and the problem's tests, as in lm-evaluation-harness 0.4.13.
Programs run in the sandbox of `sandbox.py`; the caller generates the completions.

    problems = read_problems(Path("HumanEval.jsonl.gz"))
    completions = {problem.task_id: [truncate(text)] for problem, text in zip(problems, texts)}
    result = run_completions(problems, completions, allow=True)
    result.pass_at[0].value
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.code.pass_at_k import PassAtK, mean_pass_at_k
from xinslm.evaluate.code.pool import calibrate, run_programs
from xinslm.evaluate.code.sandbox import Isolation, Limits, Outcome, isolation
from xinslm.progress import Listener, Progress, ignore

ALLOW_FLAG = "--allow-code-execution"
STOP_STRINGS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion of a function ends."""
_CALIBRATION_PROBLEMS = 8


@dataclass(frozen=True)
class Problem:
    """One function to complete, with tests."""

    task_id: str
    prompt: str
    """Imports, signature and docstring."""
    canonical_solution: str
    test: str
    """Defines `check(candidate)`."""
    entry_point: str
    """Name of the function."""


@dataclass(frozen=True)
class ProblemResult:
    """The outcomes of one problem's completions, in their order."""

    task_id: str
    outcomes: tuple[Outcome, ...]

    @property
    def num_passed(self) -> int:
        """How many completions passed."""
        return sum(outcome.passed for outcome in self.outcomes)


@dataclass(frozen=True)
class HumanEvalResult:
    """The outcomes of all problems, and what they were measured under."""

    problems: tuple[ProblemResult, ...]
    pass_at: tuple[PassAtK, ...]
    """One for each k that was asked for."""
    limits: Limits
    """As applied, with the calibrated time limit."""
    isolation: Isolation

    @property
    def kinds(self) -> dict[str, int]:
        """Number of completions by how they ended, the most frequent first."""
        ends = Counter(outcome.kind for problem in self.problems for outcome in problem.outcomes)
        return dict(ends.most_common())


@dataclass(frozen=True)
class RunOptions:
    """How completions are run and counted."""

    ks: tuple[int, ...] = (1,)
    """Each k of pass@k to compute."""
    limits: Limits | None = None
    """None: the default limits, with the time limit calibrated by reference solutions."""
    num_workers: int | None = None
    """Programs at a time; by default and at most the number of cores."""


def read_problems(path: Path) -> list[Problem]:
    """Read problems from a .jsonl or .jsonl.gz file in the format of the authors' release.

    Errors name the file and the line.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is no file; pass HumanEval as .jsonl or .gz")
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        lines = content.decode("utf-8").split("\n")
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise XinslmError(f"{path}: cannot be read as JSON lines: {error}") from error
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        problem = _parse(line, f"{path}, line {number}")
        if problem.task_id in problems:
            raise XinslmError(f"{path}, line {number}: {problem.task_id} occurs a second time")
        problems[problem.task_id] = problem
    if not problems:
        raise XinslmError(f"{path}: no problems in it")
    return list(problems.values())


def _parse(line: str, where: str) -> Problem:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise XinslmError(f"{where}: no valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise XinslmError(f"{where}: expected an object, found {type(record).__name__}")
    names = [field.name for field in fields(Problem)]
    wrong = [name for name in names if not isinstance(record.get(name), str)]
    if wrong:
        raise XinslmError(f"{where}: {', '.join(wrong)} missing or not a string")
    if not record["entry_point"].isidentifier():
        raise XinslmError(f"{where}: entry_point {record['entry_point']!r} is no function name")
    return Problem(**{name: record[name] for name in names})


def truncate(completion: str) -> str:
    """Cut a completion before the first stop string, where the function has ended."""
    ends = [completion.find(stop) for stop in STOP_STRINGS]
    return completion[: min((end for end in ends if end >= 0), default=len(completion))]


def program(problem: Problem, completion: str) -> str:
    """The program that passes if the completion is correct."""
    body = f"{problem.prompt}{completion}\n{problem.test}\n"
    return f"{body}check({problem.entry_point})\n"


def run_completions(
    problems: Sequence[Problem],
    completions: Mapping[str, Sequence[str]],
    options: RunOptions | None = None,
    *,
    allow: bool,
    on_progress: Listener = ignore,
) -> HumanEvalResult:
    """Run every completion of every problem; `completions` is by task_id, and not truncated here.

    UsageError if `allow` is False, or if completions are missing or belong to no problem.
    ValueError if a problem has fewer completions than the largest k. XinslmError if a reference
    solution or a program for reasons of the system's cannot run.
    """
    if not allow:
        raise UsageError(
            "HumanEval runs code that a model wrote. xinslm limits it, but is no security "
            f"boundary; pass {ALLOW_FLAG} to run it on this machine"
        )
    options = options or RunOptions()
    _check_completions(problems, completions, options.ks)
    limits = options.limits
    if limits is None:
        on_progress(Progress("calibrate the time limit"))
        chosen = problems[:: max(1, len(problems) // _CALIBRATION_PROBLEMS)]
        references = [program(problem, problem.canonical_solution) for problem in chosen]
        limits = calibrate(references, num_workers=options.num_workers)
    pairs = [(problem, text) for problem in problems for text in completions[problem.task_id]]
    counter = _Counter(len(pairs), on_progress)
    outcomes = run_programs(
        [program(problem, text) for problem, text in pairs],
        limits,
        options.num_workers,
        counter.add,
    )
    results: dict[str, list[Outcome]] = {problem.task_id: [] for problem in problems}
    for (problem, _), outcome in zip(pairs, outcomes, strict=True):
        if outcome.kind == "error":
            raise XinslmError(f"{problem.task_id}: cannot run programs: {outcome.message}")
        results[problem.task_id].append(outcome)
    rows = tuple(ProblemResult(task_id, tuple(ended)) for task_id, ended in results.items())
    counts = [(len(row.outcomes), row.num_passed) for row in rows]
    pass_at = tuple(mean_pass_at_k(counts, k) for k in options.ks)
    return HumanEvalResult(rows, pass_at, limits, isolation())


def _check_completions(
    problems: Sequence[Problem], completions: Mapping[str, Sequence[str]], ks: tuple[int, ...]
) -> None:
    """Check before anything runs that all problems can be counted."""
    if not problems:
        raise UsageError("no problems to run completions of")
    names = [problem.task_id for problem in problems]
    if missing := [name for name in names if not completions.get(name)]:
        raise UsageError(f"no completions of {len(missing)} problems, the first {missing[0]}")
    if unknown := sorted(completions.keys() - set(names)):
        raise UsageError(f"completions of {unknown[0]}, which is none of the problems")
    for name in names:
        mean_pass_at_k([(len(completions[name]), 0)], max(ks))


class _Counter:
    """Counts ended programs for the progress display."""

    def __init__(self, total: int, on_progress: Listener) -> None:
        self.total, self.on_progress = total, on_progress
        self.done = self.passed = 0

    def add(self, outcome: Outcome) -> None:
        self.done += 1
        self.passed += outcome.passed
        values = {"passed": self.passed / self.done}
        self.on_progress(Progress("run programs", self.done, self.total, "programs", values))
