"""The processes of a sandbox, read from /proc, and an end to all of them."""

import os
import time

SIGKILL, SIGXCPU = 9, 24  # on Linux and macOS; the module `signal` is slow to import
_ROUNDS, _PAUSE_SECONDS = 400, 0.005


class Process:
    """One line of /proc/PID/stat."""

    def __init__(self, pid: int, stat: bytes) -> None:
        fields = stat.rpartition(b")")[2].split()  # a name may contain spaces
        self.pid = pid
        self.parent = int(fields[1])
        self.num_threads = int(fields[17])
        self.resident_bytes = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _all_processes() -> list[Process]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found.append(Process(int(name), file.read()))
            except OSError:  # it has ended
                continue
    return found


def kill(pid: int, group: bool = False) -> None:
    """Kill a process, or a process group, that may have ended already."""
    try:
        (os.killpg if group else os.kill)(pid, SIGKILL)
    except OSError:
        return


def descendants(root: int) -> list[Process]:
    """All processes below `root`, parents first; empty where there is no /proc."""
    if not os.path.isdir("/proc/self"):
        return []
    children: dict[int, list[Process]] = {}
    for process in _all_processes():
        children.setdefault(process.parent, []).append(process)
    found = list(children.get(root, []))
    for process in found:  # grows while it is read
        found += children.get(process.pid, [])
    return found


def longest_queueing(root: int) -> float:
    """Seconds that a process below `root` was ready to run but had no processor; the longest."""
    longest = 0
    for process in descendants(root):
        try:
            with open(f"/proc/{process.pid}/schedstat", "rb") as file:
                longest = max(longest, int(file.read().split()[1]))
        except (OSError, IndexError):  # ended, or the kernel does not count
            continue
    return longest / 1e9


def count_threads(uid: int) -> int:
    """Threads that a user runs, which is what RLIMIT_NPROC counts."""
    total = 0
    for process in _all_processes():
        try:
            if os.stat(f"/proc/{process.pid}").st_uid == uid:
                total += process.num_threads
        except OSError:
            continue
    return total


def kill_all(first: int, group: int | None) -> None:
    """Kill a child and all that came from it, and wait for their end.

    `group` is None if the child is the init process of a PID namespace: its end is the end of all.
    Otherwise the program's process group goes first (0: not known yet), then whatever this process
    has adopted.
    """
    if group:
        kill(group, group=True)
    kill(first)
    _collect(first)
    if group is None:
        return
    for _ in range(_ROUNDS):
        left = descendants(os.getpid())
        for process in left:
            kill(process.pid)
        _collect()
        if not left:
            return
        time.sleep(_PAUSE_SECONDS)


def _collect(pid: int | None = None) -> None:
    """Wait for the end of a child; without one, take those that have ended."""
    try:
        if pid is not None:
            os.waitpid(pid, 0)
        else:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    except ChildProcessError:
        return
