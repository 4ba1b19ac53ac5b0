"""Peak memory of this process, and energy of the machine, from what the system reports."""

import sys
from pathlib import Path
from typing import NamedTuple

_STATUS = Path("/proc/self/status")
_POWERCAP = Path("/sys/class/powercap")


def peak_memory_bytes(status: Path = _STATUS) -> int | None:
    """Most resident memory of this process so far; None if the system does not say.

    Linux: `VmHWM`, which starts anew with each program; `ru_maxrss` is inherited from the parent.
    Pages of mapped files count while they are in memory.
    """
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Counter(NamedTuple):
    """One processor package of Linux's RAPL interface, in microjoules."""

    energy: int
    wraps_at: int


class EnergyMeter:
    """Energy that the processor packages take from here on, all processes included."""

    def __init__(self, root: Path = _POWERCAP) -> None:
        self._root = root
        self._first = _read_counters(root)

    def joules(self) -> float | None:
        """Energy since the start; None if the counters do not exist, are not readable or stand
        still.
        """
        now = _read_counters(self._root)
        if not now or now.keys() != self._first.keys():
            return None
        total = 0
        for name, counter in now.items():
            used = counter.energy - self._first[name].energy
            total += used if used >= 0 else used + counter.wraps_at
        return total / 1e6 if total > 0 else None


def _read_counters(root: Path) -> dict[str, _Counter]:
    """Counters of the packages by name of their folder; empty if one of them is not readable.

    The other zones are parts of a package (`core`) or the platform (`psys`): they count it again.
    """
    counters = {}
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if (zone / "name").read_text().startswith("package"):
                energy, wraps_at = (
                    int((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj")
                )
                counters[zone.name] = _Counter(energy, wraps_at)
    except (OSError, ValueError):
        return {}
    return counters
