"""Work on tensors in pieces that stay in the processor's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors of one shape (..., size), on a CPU 512 kB in float32 at a time; all at once
    on other devices and under a compiler.
    """
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    size = flat[0].shape[1]
    if flat[0].device.type != "cpu" or torch.compiler.is_compiling():
        return iter([tuple(flat)])
    return zip(*(x.split(max(1, 2**17 // size)) for x in flat), strict=True)
