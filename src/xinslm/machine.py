"""The machine that figures come from, and how much other processes used it meanwhile.

`load = OtherLoad()` before what is timed and `load.share()` after it give the share of the
machine's CPU time that other processes took.
"""

import functools
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

MAX_OTHER_LOAD = 0.1
"""A speed measured while other processes used more of the machine's CPU time is not reported."""
_MIN_SECONDS = 0.2  # the kernel counts in ticks of 10 ms


def environment(device: Any = None) -> dict[str, str]:
    """Date and machine for a run file; `device` is the torch.device that computes."""
    import torch

    parts = [_cpu(), f"{usable_cores()} cores"]
    if device is not None and device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"date": now, "machine": ", ".join([*parts, f"torch {torch.__version__}"])}


def usable_cores() -> int:
    """Whole cores that this process may use, by its affinity and its control groups' limits."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    limit = cpu_limit()
    return count if limit is None else max(1, min(count, int(limit)))


@functools.cache
def cpu_limit(
    own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Cores' worth of CPU time that Linux' control groups of this process allow, the least of all
    levels; None if they set no limit. `own` names the groups, which are folders below `groups`.

    A container often sees its own group as the root while `own` has the path outside, so the root
    counts, too.
    """
    try:
        lines = own.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    limits = [_limit_of(groups), _limit_of(groups / "cpu")]
    for line in lines:
        _, controllers, path = f"{line}::".split(":", 2)
        path = path.removesuffix("::")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 1 in one of two usual places, or 2
        for root in (groups / "cpu", groups / controllers) if controllers else (groups,):
            place = root / path.lstrip("/")
            for folder in (place, *place.parents):
                limits.append(_limit_of(folder))
                if folder == root:
                    break
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        limit = int(quota) / int(period)  # "max" is no number, and -1 says the same
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return limit if limit > 0 else None


def _cpu() -> str:
    """The processor's model name."""
    import platform
    import subprocess  # slow to import, and rarely needed

    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.check_output(command, text=True).strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def is_shared(load: Any) -> bool:
    """Whether other processes used so much CPU time that a speed is not meaningful; False if
    unknown.
    """
    return isinstance(load, int | float) and load > MAX_OTHER_LOAD


@dataclass(frozen=True)
class _Reading:
    """Seconds of the wall clock and of CPU time."""

    clock: float
    own: float
    """Of this process and its finished children."""
    busy: float = 0.0
    """Of all cores of the machine; 0 if the system does not say."""
    total: float = 0.0
    """The same, idle time included."""


class OtherLoad:
    """Measures the share of the machine's CPU time that other processes take."""

    def __init__(self) -> None:
        self._last = _read()
        self._share: float | None = None

    def share(self) -> float | None:
        """Share over the time since it was last measured, from 0 to 1; asked again within 0.2
        second, the same. None if it was never measured.
        """
        now, last = _read(), self._last
        if now.clock - last.clock < _MIN_SECONDS:
            return self._share
        self._last = now
        own = now.own - last.own
        if now.total > last.total:
            other = (now.busy - last.busy - own) / (now.total - last.total)
        elif hasattr(os, "getloadavg"):  # an average over a minute: coarser
            other = (os.getloadavg()[0] - own / (now.clock - last.clock)) / (os.cpu_count() or 1)
        else:
            return None
        self._share = min(max(other, 0.0), 1.0)
        return self._share


def _read() -> _Reading:
    own = sum(os.times()[:4])
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return _Reading(time.monotonic(), own)
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in first[1:9]]
    total, idle = sum(ticks), ticks[3] + ticks[4]
    return _Reading(time.monotonic(), own, total - idle, total)
