"""The process between xinslm and a generated program: starts it, watches it, ends it.

Tree of processes: xinslm, this supervisor, an init process, the program. The supervisor stays
outside the program's namespaces and reads its output. Init waits for the program; if it is the
first process of a PID namespace, its end kills all the others in it. If xinslm ends, a pipe closes
and the supervisor kills the program.

Started by `sandbox.py`. The job is a marshalled dict on the standard input; the result is text on
the standard output: class, seconds, measures, message and output, with NUL between them.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
import time

from . import confine
from .processes import SIGXCPU, descendants, kill_all, longest_queueing

if sys.platform == "linux":
    from . import linux

MOST_QUEUEING = 5
"""Most wall time of a program that waits for a processor, in time limits."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

_CHUNK = 1 << 16
_SLOW_SECONDS, _FAST_SECONDS = 0.2, 0.02
"""Time between two looks at the processes: if their number is limited, and if it is not."""


class _Watch:
    """What the supervisor learned about a running program."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.output = b""
        self.status_lines = b""
        self.stopped: tuple[str, str] | None = None
        self.started = time.monotonic()
        self.looked = self.started

    @property
    def facts(self) -> dict[str, str]:
        """Group and measures as the program's process told, status as init told."""
        lines = self.status_lines.decode().splitlines()
        return dict(line.split(" ", 1) for line in lines)

    @property
    def measures(self) -> list[str]:
        """Measures that took effect in the program's process."""
        names = self.facts.get("measures", "")
        return names.split(",") if names else []

    def until_end(self, init: int, output: int, status: int, parent: int) -> None:
        """Read output and status until the program has ended or must be stopped."""
        poll = select.poll()
        for pipe in (output, status, parent):
            poll.register(pipe, select.POLLIN)
        pause = _SLOW_SECONDS
        while self.stopped is None:
            for pipe, _ in poll.poll(pause * 1000):
                data = os.read(pipe, _CHUNK)
                if pipe == parent:
                    self.stopped = ("error", "the evaluation was stopped")
                elif pipe == output:
                    self._keep(data)
                    if not data:
                        poll.unregister(output)
                elif data:
                    self.status_lines += data
                    if "processes" in self.measures:
                        confine.run_first(False)
                    else:
                        pause = _FAST_SECONDS
                else:
                    return
            self._check(init, pause)

    def _keep(self, data: bytes) -> None:
        self.output += data[: self.job["output_bytes"] - len(self.output)]

    def drain(self, output: int) -> None:
        """Take what is left in the pipe after the end."""
        while len(self.output) < self.job["output_bytes"] and (data := _read_now(output)):
            self._keep(data)

    def _check(self, init: int, pause: float) -> None:
        """Stop the program if it is over its time, its processes or its memory."""
        now = time.monotonic()
        if now - self.looked < pause:
            return
        self.looked = now
        seconds, passed = self.job["timeout_seconds"], now - self.started
        if passed > seconds:
            # on a busy machine a correct program may wait longer for a processor than it runs
            queueing = longest_queueing(init)
            if passed - queueing > seconds or passed > MOST_QUEUEING * seconds:
                self.stopped = ("timeout", f"not finished after {seconds:g} seconds")
        found = descendants(init)
        if sum(process.num_threads for process in found) > self.job["processes"]:
            self.stopped = ("processes", f"more than {self.job['processes']} processes and threads")
        # a page that processes share counts in each of them, so a fork bomb is over both limits
        elif sum(process.resident_bytes for process in found) > self.job["memory_bytes"]:
            limit = self.job["memory_bytes"] >> 20
            self.stopped = ("memory", f"its processes used more than {limit} MiB")


def _read_now(pipe: int) -> bytes:
    """Read what a pipe contains, without waiting for more."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, _CHUNK)
    except BlockingIOError:
        return b""


def supervise(job: Job) -> str:
    """Run the job's program to its end, or end it, and say how that went."""
    job = {**job, "number": os.getpid(), "program": os.path.join(job["folder"], "program.py")}
    job["first"] = confine.run_first(True)
    os.set_inheritable(job["parent"], False)
    separated = confine.separate(job)
    with open(job["program"], "wb") as file:
        file.write(job["source"].encode("utf-8", "surrogatepass"))
    token = os.urandom(16).hex().encode()
    (output, output_in), (status, status_in) = os.pipe(), os.pipe()
    (token_out, token_in), (report, report_in) = os.pipe(), os.pipe()
    os.write(token_in, token)
    watch = _Watch(job)
    init = os.fork()
    if init == 0:
        try:
            _init(job, separated, status_in, (output_in, token_out, report_in))
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(1)
    for pipe in (output_in, status_in, token_out, token_in, report_in):
        os.close(pipe)
    try:
        watch.until_end(init, output, status, job["parent"])
    finally:
        group = int(watch.facts.get("group", 0))
        kill_all(init, None if "pids" in separated else group)
    seconds = time.monotonic() - watch.started
    watch.drain(output)
    kind, message = watch.stopped or _classify(watch.facts.get("status"), _read_now(report), token)
    measures = ",".join(separated + watch.measures)
    output_text = watch.output.decode("utf-8", "replace")
    return "\0".join([kind, str(seconds), measures, message.replace("\0", " "), output_text])


def _init(job: Job, separated: list[str], status: int, pipes: tuple[int, int, int]) -> None:
    """Start the program, collect ended processes until it is among them, and tell its status."""
    if sys.platform == "linux":
        linux.die_with_parent()
    program = os.fork()
    if program == 0:
        try:
            _become_program(job, separated, status, pipes)
        except BaseException as error:
            os.write(2, repr(error).encode())  # the program's output
        finally:
            os._exit(1)
    for pipe in pipes:
        os.close(pipe)
    while True:
        pid, result = os.wait()
        if pid == program:
            break
    os.write(status, f"status {os.waitstatus_to_exitcode(result)}\n".encode())
    os._exit(0)


def _become_program(
    job: Job, separated: list[str], status: int, pipes: tuple[int, int, int]
) -> None:
    """Confine this process and replace it by a Python that runs the program."""
    os.setsid()
    os.chdir(job["folder"])
    output, token, report = pipes
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # two places that differ from run to run
    first, second = 64 + os.urandom(1)[0] % 64, 128 + os.urandom(1)[0] % 64
    os.dup2(token, first)
    os.dup2(report, second)
    measures = ",".join(confine.confine(job, separated))
    os.write(status, f"group {os.getpid()}\nmeasures {measures}\n".encode())
    python = [sys.executable, "-I", "-S", "-c", job["child"]]
    environment = {"HOME": job["folder"], "TMPDIR": job["folder"]}
    os.execve(sys.executable, [*python, str(first), str(second), job["program"]], environment)


def _classify(status_text: str | None, told: bytes, token: bytes) -> tuple[str, str]:
    """Class and message of a program that ended by itself."""
    first, _, rest = told.partition(b"\n")
    if first != b"started":
        return "error", "Python did not start within the limits"
    if status_text is None:
        return "crashed", "killed the process that waits for it"
    status = int(status_text)
    if status == -SIGXCPU:
        return "timeout", "used up its CPU time"
    if status < 0:
        return "crashed", f"killed by {_signal_name(-status)}"
    kind, _, message = rest.partition(b"\n")
    if status == 0 and kind == token:
        return "passed", ""
    if kind in (b"failed", b"memory", b"exited"):
        return kind.decode(), message.decode("utf-8", "replace")
    return "exited", f"exit status {status} before its end"


def _signal_name(number: int) -> str:
    import signal  # slow to import, and rarely needed

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def main() -> None:
    """Read a job, run it, write the result."""
    result = supervise(marshal.load(sys.stdin.buffer))
    sys.stdout.buffer.write(result.encode("utf-8", "replace"))
