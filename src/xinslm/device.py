"""Where tensors live, and what becomes of their memory."""

import ctypes
import sys

import torch

from xinslm.errors import UsageError
from xinslm.precision import use_fast_float32


def pick_device(name: str) -> torch.device:
    """'auto' takes cuda, then mps, then cpu; a device that is requested by name must be there.

    Products on CPU run in the fastest library from then on (`use_fast_float32`).
    """
    use_fast_float32()
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name, False):
        raise UsageError(
            f"device {name} is not available here; there is "
            f"{', '.join(k for k, v in available.items() if v)}"
        )
    return torch.device(name)


def return_freed_memory() -> None:
    """Make glibc give tensors of 300 kB and more back to the system when they are freed.

    It would keep blocks of up to 32 MiB and leave gaps between them: twice the memory where
    activations are recomputed. The price is fresh pages for each tensor, but not for the
    optimizer's pieces, which are smaller. Elsewhere than on Linux with glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(ctypes.c_int(-3), ctypes.c_int(300_000))  # M_MMAP_THRESHOLD, fixed from here on
