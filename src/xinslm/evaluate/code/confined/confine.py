"""Steps by which a process gives up what a generated program must not have.

`separate` runs in the supervisor, before it forks; `confine` in the program's process, just before
it becomes Python. Both return the names of the measures that took effect, see `MEASURES`.
"""

from __future__ import annotations

import os
import resource
import sys

from .processes import count_threads

if sys.platform == "linux":
    from . import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MEASURES = {
    "network": "no network",
    "tcp": "no TCP connections",
    "pids": "own process namespace; all its processes end with the program",
    "orphans": "processes that leave the program's group are found and killed",
    "disk": "own temporary file system of limited size",
    "files": "no writes outside its temporary folder",
    "signals": "no signals to processes outside",
    "user": "runs as a user without files or privileges",
    "cpu": "CPU time",
    "memory": "address space of each process",
    "file size": "size of each file",
    "open files": "open files",
    "core": "no core dumps",
    "processes": "number of processes",
}
"""Everything a sandbox may have, by the name that `Isolation` uses, in words."""

FIRST_UNUSED_USER = 3_000_000_000
"""User numbers from here on are assigned to nobody; one for each sandbox."""
NOBODY = 65534


def separate(job: dict[str, Any]) -> list[str]:
    """Create namespaces, and the temporary file system in one of them."""
    if sys.platform != "linux":
        return []
    done = ["orphans"] if linux.adopt_orphans() else []
    if job["level"] == "limits":
        return done
    if os.geteuid() != 0 and linux.new_user_namespace():
        done.append("user namespace")
    if linux.unshare(linux.NEW_NETWORK):
        done.append("network")
    if linux.unshare(linux.NEW_PIDS):
        done.append("pids")
    linux.unshare(linux.NEW_IPC)
    if linux.private_folder(job["folder"], job["disk_bytes"]):
        done.append("disk")
    return done


def run_first(first: bool) -> bool:
    """Let this process, but not its children, run before all ordinary ones, or no longer.

    RLIMIT_NPROC does not bind root, so a fork bomb ends when the supervisor gets to see it. Only
    root may; returns whether it did.
    """
    try:
        policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK if first else os.SCHED_OTHER
        os.sched_setscheduler(0, policy, os.sched_param(int(first)))
    except (AttributeError, OSError):  # macOS, containers
        return False
    return True


def confine(job: dict[str, Any], separated: list[str]) -> list[str]:
    """Change the user, set the limits, and forbid writes outside the folder."""
    done = []
    if sys.platform == "linux":
        _offer_to_out_of_memory_killer()
        if job["level"] == "full" and os.geteuid() == 0 and _change_user(job):
            done.append("user")
    done += _set_limits(job, separated)
    if "processes" not in done and not job["first"]:
        os.nice(19)  # a fork bomb must not keep the supervisor from the processor
    if sys.platform == "linux":
        linux.die_with_parent()
        if linux.forbid_new_privileges() and job["level"] != "limits":
            done += linux.restrict(job["folder"])
    return done


def _offer_to_out_of_memory_killer() -> None:
    """If the machine's memory runs out, this process goes first."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def _change_user(job: dict[str, Any]) -> bool:
    """Turn from root into a user of this sandbox's own, else into nobody."""
    hidden = not all(map(linux.is_open_to_all, (sys.executable, os.__file__, job["folder"])))
    for uid in (FIRST_UNUSED_USER + job["number"], NOBODY):
        try:
            os.chown(job["folder"], uid, uid)
            os.chown(job["program"], uid, uid)
        except OSError:  # containers may know few numbers
            continue
        if linux.become(uid, reads_everything=hidden):
            return True
    return False


def _set_limits(job: dict[str, Any], separated: list[str]) -> list[str]:
    """Set each resource limit that the platform enforces, and name them."""
    seconds = int(job["timeout_seconds"]) + 2
    limits = {
        "cpu": (resource.RLIMIT_CPU, seconds),
        "file size": (resource.RLIMIT_FSIZE, job["file_bytes"]),
        "open files": (resource.RLIMIT_NOFILE, job["open_files"]),
        "core": (resource.RLIMIT_CORE, 0),
    }
    if sys.platform == "linux":
        # macOS counts shared libraries in the address space, and Python does not start under a
        # limit; its count of processes is that of everything the user runs
        limits["memory"] = (resource.RLIMIT_AS, job["memory_bytes"])
        if (uid := os.geteuid()) != 0:  # does not bind root
            # besides this one; in a namespace, the supervisor and init are the only ones
            others = 2 if "user namespace" in separated else count_threads(uid) - 1
            limits["processes"] = (resource.RLIMIT_NPROC, others + job["processes"])
    done = []
    for name, (which, value) in limits.items():
        last = value + 1 if name == "cpu" else value  # a signal first, then the end
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY:
            value, last = min(value, hard), min(last, hard)
        try:
            resource.setrlimit(which, (value, last))
        except (OSError, ValueError):
            continue
        done.append(name)
    return done
