"""Runs one generated Python program in a limited process of its own and classes how it ended.

    outcome = run_program("assert sorted([2, 1]) == [1, 2]", Limits(timeout_seconds=3))
    outcome.kind, outcome.message

The program runs under `python -I -S` with an empty environment (HOME and TMPDIR are its temporary
folder), standard input at its end, and limits on time, memory, processes, files and output. On
Linux it also gets namespaces without network and other processes, no right to write outside its
folder, and, if xinslm runs as root, a user of its own, as far as the system allows: `isolation`
says what holds here. A program passes only if it runs to its last statement; leaving early with
status 0 does not count.

**This is not a security boundary.** It contains the accidents of generated code, not an attacker:

- The program reads every file that the user may read, and talks to local sockets that the user may
  open.
- It shares the interpreter with the code that reports its end. A program that searches its own
  process can forge a pass.
- Kernel bugs, timing, and use of the processor up to the time limit are open to it.
- Without the measures that `isolation().missing` names, it can also reach the network, write the
  user's files and kill the user's processes. On macOS that is always so, and memory is unlimited.

For code that you have reason to fear, run all of xinslm inside a virtual machine.
"""

import contextlib
import functools
import marshal
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from xinslm.errors import UsageError, XinslmError

Kind = Literal["passed", "failed", "timeout", "memory", "processes", "exited", "crashed", "error"]
"""How a program ended:

passed      it ran to its end
failed      an exception, such as an AssertionError, ended it
timeout     it was over its wall or CPU time
memory      a MemoryError ended it, or its processes together were over the limit
processes   it had too many processes; where their number is limited, a fork fails instead
exited      it left before its end, with whatever status
crashed     a signal ended it, or it killed the processes that watch it
error       it never started; a fault of the system, not of the program
"""

_GRACE_SECONDS = 30.0
_SUPERVISOR = (
    "import sys; sys.path.insert(0, {folder!r}); from confined.supervisor import main; main()"
)


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    timeout_seconds: float = 10.0
    """Wall time without waiting for a processor, up to five times as much with it; also CPU time
    of each process.
    """
    memory_bytes: int = 2 << 30
    """Address space of each process, and resident memory of all together."""
    file_bytes: int = 16 << 20
    """Size of a file."""
    disk_bytes: int = 64 << 20
    """Size of the temporary folder, where it is a file system of its own."""
    processes: int = 32
    """Processes and threads at one time."""
    open_files: int = 256
    """Open files of each process."""
    output_bytes: int = 8192
    """Standard output and error that are kept, from the beginning; the rest is dropped."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"limit {name} of generated programs is {value}; it must be > 0")


@dataclass(frozen=True)
class Outcome:
    """How one program ended."""

    kind: Kind
    message: str
    """One or two lines: the exception and where it was raised, the limit that was hit."""
    output: str
    """Beginning of standard output and error."""
    seconds: float
    """Wall time from the fork to the end, start of Python included."""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.kind == "passed"


@dataclass(frozen=True)
class Isolation:
    """What confines generated programs on this system; for reports."""

    platform: str
    measures: tuple[str, ...]
    """Names of the measures in force, keys of `confine.MEASURES`."""
    missing: tuple[str, ...]
    """Names of those that this system lacks or refuses."""

    @property
    def network(self) -> bool:
        """Whether programs are cut off from the network."""
        return "network" in self.measures

    @property
    def process_namespace(self) -> bool:
        """Whether no process of a program outlives it, whatever it does."""
        return "pids" in self.measures

    @property
    def files(self) -> bool:
        """Whether programs cannot write outside their folder."""
        return "files" in self.measures

    def describe(self) -> list[str]:
        """Two sentences for a report."""
        from xinslm.evaluate.code.confined.confine import MEASURES

        lines = [f"In force: {'; '.join(MEASURES[name] for name in self.measures)}."]
        if self.missing:
            lines.append(
                f"Not available on this system ({self.platform}): "
                f"{'; '.join(MEASURES[name] for name in self.missing)}."
            )
        return lines


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program in a process of its own and class its end.

    Raises XinslmError if the system cannot run any program.
    """
    return _run(source, limits or Limits(), _level())[0]


def isolation() -> Isolation:
    """The measures in force on this system, found out by running a program."""
    from xinslm.evaluate.code.confined.confine import MEASURES

    found = _run("", Limits(), _level())[1]
    held = tuple(name for name in MEASURES if name in found)
    missing = tuple(name for name in MEASURES if name not in found and _applies(name))
    return Isolation(sys.platform, held, missing)


def _applies(name: str) -> bool:
    """Whether the lack of a measure is worth a word: only root can change its user."""
    return name != "user" or os.geteuid() == 0


@functools.cache
def _level() -> str:
    """The strictest set of measures under which Python starts here."""
    if os.name != "posix":
        raise UsageError(f"generated code runs on Linux and macOS only, not on {sys.platform}")
    for level in ("full", "same user", "limits"):
        outcome, _ = _run("", Limits(timeout_seconds=60), level)
        if outcome.passed:
            return level
    raise XinslmError(f"cannot run generated code here: {outcome.message}. {outcome.output}")


def _run(source: str, limits: Limits, level: str) -> tuple[Outcome, list[str]]:
    """Run a program under a set of measures; returns those that took effect, too."""
    from xinslm.evaluate.code.confined.supervisor import MOST_QUEUEING

    here = Path(__file__).resolve().parent
    child = (here / "confined" / "child.py").read_text(encoding="utf-8")
    job = {**asdict(limits), "source": source, "level": level, "child": child}
    with tempfile.TemporaryDirectory(prefix="xinslm-", ignore_cleanup_errors=True) as folder:
        watched, held = os.pipe()  # closes when this process ends, however it ends
        try:
            job |= {"folder": os.path.realpath(folder), "parent": watched}
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _SUPERVISOR.format(folder=str(here))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                pass_fds=[watched],
                start_new_session=True,
            )
            longest = MOST_QUEUEING * limits.timeout_seconds
            return _communicate(process, marshal.dumps(job), longest)
        finally:
            os.close(watched)
            os.close(held)


def _communicate(
    process: subprocess.Popen[bytes], job: bytes, timeout: float
) -> tuple[Outcome, list[str]]:
    """Send the job, wait for the result, and make sure that the supervisor is gone."""
    try:
        written, errors = process.communicate(job, timeout + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        written, errors = b"", b""
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ValueError):
            process.communicate()
    if written:
        kind, seconds, measures, message, output = written.decode("utf-8").split("\0", 4)
        return Outcome(cast(Kind, kind), message, output, float(seconds)), measures.split(",")
    if errors:
        raise XinslmError(
            f"the supervisor of generated programs failed: {errors.decode(errors='replace')[-500:]}"
        )
    message = "killed or stopped the process that watches it"
    return Outcome("crashed", message, "", 0.0), []
