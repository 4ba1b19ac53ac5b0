"""Where tensors live."""

import torch

from xinslm.errors import UsageError


def pick_device(name: str) -> torch.device:
    """'auto' takes cuda, then mps, then cpu; a device that is asked for by name must be there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name, False):
        raise UsageError(
            f"device {name} is not available here; there is {', '.join(k for k, v in available.items() if v)}"
        )
    return torch.device(name)
