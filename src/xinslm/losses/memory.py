"""Memory for the logits of a head, kept from one loss to the next."""

import math

import torch
from torch import Tensor


class HeadMemory:
    """Blocks of memory by name, as large as the largest that was asked for.

    On a CPU the C library takes blocks of more than 32 MB from the operating system and gives them
    back, and touching fresh pages costs as much time as the products that fill them. On other
    devices PyTorch's allocator keeps memory itself, so nothing is kept here.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory of any content, valid until the next call with this name."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape)
        block = self._blocks.get((name, dtype))
        if block is None or len(block) < size:
            self._blocks.pop((name, dtype), None)
            block = self._blocks[name, dtype] = torch.empty(size, dtype=dtype)
        return block[:size].view(shape)
