"""Leaves cores to other processes: PyTorch gets as many threads as there are cores free.

A parallel region waits for its slowest thread. If another process holds one of two cores, training
a small model with two threads is 3 to 8 times slower, with one thread 1.4 to 1.7 times. Threads
that sleep while they wait (OMP_WAIT_POLICY=passive) make an idle machine 1.4 to 1.6 times slower.
`benchmarks/busy_neighbour.py` measures this; docs/diary.md has the figures.

The number of threads changes sums in the last bits. Set OMP_NUM_THREADS to fix it.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from xinslm.progress import Listener, Progress

FIXED_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user fixes the number of threads."""
SECONDS_BETWEEN_CHECKS = 1.0


@cache
def threads_at_first() -> int:
    """Threads that PyTorch began with. The commands of one process, as in `demo`, share them: one
    that ends while a neighbour is busy does not bind the next to fewer.
    """
    number: int = sys.modules["torch"].get_num_threads()
    return number


def seconds_of_others() -> float | None:
    """Processor seconds of other processes on this one's cores; None if not on Linux."""
    try:
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except (AttributeError, OSError):  # not Linux
        return None
    # user nice system idle iowait irq softirq steal
    ticks = sum(sum(map(int, (*row[1:4], *row[6:9]))) for row in rows if row and row[0] in names)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


class FreeCores:
    """A listener that adjusts PyTorch's threads to the free cores, then passes the report on."""

    def __init__(
        self,
        listener: Listener,
        environ: Mapping[str, str],
        measure: Callable[[], float | None] = seconds_of_others,
    ) -> None:
        self.listener, self.measure = listener, measure
        self.time, self.used = time.monotonic(), measure()
        self.fixed = self.used is None or any(name in environ for name in FIXED_BY)
        self.noted = False

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        if not self.fixed and time.monotonic() - self.time >= SECONDS_BETWEEN_CHECKS:
            self._adjust(progress.stage)
        self.listener(progress)

    def _adjust(self, stage: str) -> None:
        torch, now, used = sys.modules.get("torch"), time.monotonic(), self.measure()
        if torch is None or used is None or self.used is None:
            return
        cores = len(os.sched_getaffinity(0))
        others = (used - self.used) / (now - self.time)
        self.time, self.used = now, used
        threads = max(1, min(threads_at_first(), cores - round(others)))
        if threads == torch.get_num_threads():
            return
        torch.set_num_threads(threads)
        if not self.noted:
            note = (
                f"other processes use {others:.1f} of {cores} cores; threads follow: {threads} now"
            )
            self.listener(Progress(stage, note=note))
            self.noted = True
