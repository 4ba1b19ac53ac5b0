"""The heap of the C library, glibc's: what becomes of freed memory. Elsewhere nothing happens."""

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of these settings (malloc.h)."""
SLACK = 1 << 28
"""Free bytes that `HeapKeeper` allows to come on top of the usual number, if half of that is less:
what is returned has to be touched anew, so it should not be returned in every round.
"""


def return_free_memory() -> None:
    """Return freed memory to the system, which glibc keeps; 20 MB after a tokenizer is read."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """Make glibc give tensors of 300 kB and more back to the system when they are freed.

    It would keep blocks of up to 32 MiB and leave gaps between them: twice the memory where
    activations are recomputed. The price is fresh pages for each tensor, but not for the
    optimizer's pieces, which are smaller.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 300_000)  # fixed from here on


def keep_free_memory() -> None:
    """Let glibc keep freed blocks of any size for the next ones, instead of giving those above 32
    MB back to the system, which then zeroes the pages of the next block one by one.

    For a process that reads, converts and frees one matrix after the other: half the time of an
    export of 1B weights, for up to a quarter more memory.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


class HeapKeeper:
    """Returns free memory to the system when a loop has left too much of it in pieces.

    PyTorch's tensors begin at multiples of 64 bytes. glibc (seen with 2.36; its bug 30723) cuts
    such a block out of a larger one, small objects settle in the cuttings, and between them a freed
    block is a few bytes too small for the next tensor of its size. A training step of 113M
    parameters leaves 70 to 130 MB of such holes, 20 GB after 245 steps.
    """

    def __init__(self) -> None:
        self._usual = self._limit = -1

    def after_step(self) -> None:
        """Look at the heap after a round of the loop; the first one tells what is usual."""
        free = free_bytes()
        if self._limit < 0:
            self._usual = free
        elif free > self._limit:
            return_free_memory()
        else:
            return
        # holes count as free after their return, too
        self._limit = free + max(SLACK, self._usual // 2)


def free_bytes() -> int:
    """Bytes on the heap that are not in use, also if `return_free_memory` has returned their pages;
    0 without glibc 2.33.
    """
    mallinfo = _function("mallinfo2")
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallInfo
    return int(mallinfo().fordblks)


class _MallInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def _function(name: str) -> Any:
    """A function of the C library, None if it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
