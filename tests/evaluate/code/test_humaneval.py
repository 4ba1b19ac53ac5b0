"""HumanEval: problem files, programs, truncation, results; the real problems where they are."""

import gzip
import json
import os
import resource
from dataclasses import asdict, replace

import pytest

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.code.humaneval import (
    Problem,
    RunOptions,
    program,
    read_problems,
    run_completions,
    truncate,
)
from xinslm.evaluate.code.sandbox import Limits

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs Linux or macOS")


def problem(name: str, sign: str) -> Problem:
    return Problem(
        task_id=f"Own/{name}",
        prompt=f'def {name}(a, b):\n    """The value of a {sign} b."""\n',
        canonical_solution=f"    return a {sign} b\n",
        test=f"def check(candidate):\n    assert candidate(7, 3) == 7 {sign} 3\n",
        entry_point=name,
    )


ADD, MULTIPLY = problem("add", "+"), problem("multiply", "*")
LIMITS = Limits(timeout_seconds=10)


def write(path, *records) -> None:
    text = "".join(
        (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
    )
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_problems_are_read(tmp_path, name):
    write(tmp_path / name, asdict(ADD) | {"extra": 1}, "", asdict(MULTIPLY))
    assert read_problems(tmp_path / name) == [ADD, MULTIPLY]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: no valid JSON"),
        ([1], "line 2: expected an object, found list"),
        ({**asdict(MULTIPLY), "test": 1}, "line 2: test missing or not a string"),
        ({"task_id": "x"}, "line 2: prompt, canonical_solution, test, entry_point missing"),
        ({**asdict(MULTIPLY), "entry_point": "f(); g"}, "line 2: entry_point 'f(); g'"),
        (asdict(ADD), "line 2: Own/add occurs a second time"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, record, message):
    path = tmp_path / "problems.jsonl"
    write(path, asdict(ADD), record)
    with pytest.raises(XinslmError) as caught:
        read_problems(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_problems(tmp_path / "none.jsonl")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    with pytest.raises(XinslmError, match=r"cut\.gz"):
        read_problems(tmp_path / "cut.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(XinslmError, match="no problems"):
        read_problems(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\n\ndef g():\n    pass", "    return 1\n"),
        ("    return 1\nclass A: pass\ndef g(): pass", "    return 1"),
        ("    return 1\nprint(f(1))\n# done", "    return 1"),
        ("    return 1\n# done\nprint(f(1))", "    return 1"),
        ("    x = 1\nif x: pass", "    x = 1"),
        ("    # a comment\n    if x:\n        print(x)\n", None),
        ("def f(): pass", None),
        ("", None),
    ],
)
def test_completions_end_where_the_function_does(completion, kept):
    assert truncate(completion) == (completion if kept is None else kept)


def test_the_program_runs_outside_the_sandbox_too():
    space: dict[str, object] = {}
    exec(program(ADD, ADD.canonical_solution), space)
    assert space["add"](1, 2) == 3
    with pytest.raises(AssertionError):
        exec(program(ADD, "    return a - b"), {})


def test_nothing_runs_without_permission(tmp_path):
    with pytest.raises(UsageError, match="--allow-code-execution"):
        run_completions([ADD], {"Own/add": ["    return a + b"]}, allow=False)


def test_outcomes_are_those_of_the_completions():
    completions = {
        "Own/multiply": ["    return a + b", "    import sys; sys.exit(0)", "    return a * b"],
        "Own/add": ["    return a + b", "    return sum((a, b))", "    return a ** b"],
    }
    seen = []
    options = RunOptions(ks=(1, 2), limits=LIMITS)
    result = run_completions(
        [ADD, MULTIPLY], completions, options, allow=True, on_progress=seen.append
    )
    assert [row.task_id for row in result.problems] == ["Own/add", "Own/multiply"]
    kinds = [[outcome.kind for outcome in row.outcomes] for row in result.problems]
    assert kinds == [["passed", "passed", "failed"], ["failed", "exited", "passed"]]
    assert result.kinds == {"passed": 3, "failed": 2, "exited": 1}
    # by hand: pass@1 is 2/3 and 1/3; of the 3 pairs of samples 3 and 2 contain a correct one
    assert [metric.value for metric in result.pass_at] == pytest.approx([1 / 2, 5 / 6])
    assert [metric.standard_error for metric in result.pass_at] == pytest.approx([1 / 6, 1 / 6])
    assert [progress.done for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].total == 6 and seen[-1].values == {"passed": 0.5}


def test_the_time_limit_is_calibrated_by_the_references():
    slow = replace(ADD, canonical_solution="    import time; time.sleep(1)\n    return a + b")
    completions = {"Own/add": ["    import time; time.sleep(4)\n    return a + b"]}
    result = run_completions([slow], completions, allow=True)
    assert 10 < result.limits.timeout_seconds < 100
    assert result.pass_at[0].value == 1  # the least limit, 3 seconds, would have stopped it
    quick = run_completions([ADD], {"Own/add": ["    return 0"]}, allow=True)
    assert quick.limits.timeout_seconds >= 3


def test_a_reference_that_fails_stops_the_evaluation():
    broken = replace(ADD, canonical_solution="    return None")
    with pytest.raises(XinslmError, match="does not pass on this system: failed: AssertionError"):
        run_completions([broken], {"Own/add": [""]}, allow=True)


@pytest.mark.parametrize(
    ("completions", "error", "message"),
    [
        ({}, UsageError, "no completions of 1 problems, the first Own/add"),
        ({"Own/add": []}, UsageError, "no completions"),
        ({"Own/add": [""], "Own/sub": [""]}, UsageError, "Own/sub, which is none"),
        ({"Own/add": [""]}, ValueError, "pass@2 needs at least 2 samples"),
    ],
)
def test_completions_are_checked_before_anything_runs(completions, error, message):
    with pytest.raises(error, match=message):
        run_completions([ADD], completions, RunOptions(ks=(1, 2), limits=LIMITS), allow=True)


@pytest.mark.slow
def test_the_real_problems(shared_data):
    """All reference solutions pass and all empty completions fail, in little time."""
    path = shared_data / "bench" / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    problems = read_problems(path)
    assert len(problems) == 164
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    references = {row.task_id: [row.canonical_solution] for row in problems}
    assert run_completions(problems, references, allow=True).kinds == {"passed": 164}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time, because others may be at work: 30 s on two cores that are half taken
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    empty = {row.task_id: [""] for row in problems}
    assert run_completions(problems, empty, allow=True).kinds == {"failed": 164}
