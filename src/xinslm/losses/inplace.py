"""In-place operations on logits that all losses share."""

import torch
from torch import Tensor


def widest(x: Tensor) -> torch.dtype:
    """Type for sums: float64, which Apple's GPUs do not have."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def softmax_(z: Tensor) -> Tensor:
    """Replace logits by probabilities; return the log-normaliser (rows, 1)."""
    top = z.amax(dim=1, keepdim=True)
    # works row by row on CPU, so a row is still in the cache when it is scaled
    if z.device.type == "cpu":
        torch.softmax(z, dim=1, out=z)
        return top - z.amax(dim=1, keepdim=True).log()
    total = z.sub_(top).exp_().sum(dim=1, keepdim=True)
    z.div_(total)
    return top + total.log()


def add_at_labels_(z: Tensor, labels: Tensor, value: Tensor | float) -> None:
    """Add `value`, a number or (rows, 1), to z at the labels."""
    z.scatter_add_(
        1, labels[:, None], torch.as_tensor(value, dtype=z.dtype, device=z.device).expand(len(z), 1)
    )
