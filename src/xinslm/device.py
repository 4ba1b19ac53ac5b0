"""Where tensors live."""

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
