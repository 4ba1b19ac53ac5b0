"""Weights in the layouts that transformers and mlx-lm read, decoded by their definitions.

Codes lie in 32-bit words, the first one in the lowest bits.

- compressed-tensors, `pack-quantized`: NAME.weight_packed int32 (rows, columns * bits / 32),
  NAME.weight_scale (rows, columns / group), NAME.weight_shape; NAME.weight_g_idx (columns), the
  group of each column, if they are not in order; weight = (code - 2^(bits - 1)) * scale.
- GPTQ: NAME.qweight int32 (columns * bits / 32, rows), NAME.scales (columns / group,
  rows), NAME.qzeros int32 (columns / group, rows * bits / 32), in version 1 the zero points less 1,
  NAME.g_idx (columns), the group of each column; weight = (code - zero) * scale.
- MLX, affine: NAME.weight uint32 (rows, columns * bits / 32), NAME.scales and NAME.biases (rows,
  columns / group); weight = code * scale + bias.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Read = Callable[[str], Tensor]
"""From the name of a tensor of a file to the tensor."""


def unpack(words: Tensor, bits: int) -> Tensor:
    """The codes in words (rows, n), int32 or uint32: int64 (rows, n * 32 / bits)."""
    values = words.contiguous().view(torch.int32).numpy().view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    parts = (values[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return torch.from_numpy(parts.reshape(*values.shape[:-1], -1).astype(np.int64))


def compressed_tensors(read: Read, stem: str, bits: int, is_ordered: bool = True) -> Tensor:
    """One weight of a compressed-tensors file, float32 (rows, columns)."""
    rows, columns = (int(size) for size in read(f"{stem}.weight_shape"))
    signed = unpack(read(f"{stem}.weight_packed"), bits)[:rows, :columns] - (1 << (bits - 1))
    scales = read(f"{stem}.weight_scale")
    if is_ordered:
        return _scaled(signed, scales)
    return signed.float() * scales.float()[:, read(f"{stem}.weight_g_idx").long()]


def gptq(read: Read, stem: str, bits: int, version: int = 1) -> Tensor:
    """One weight of a GPTQ file, float32 (rows, columns)."""
    values = unpack(read(f"{stem}.qweight").T, bits)  # (rows, columns)
    zeros = unpack(read(f"{stem}.qzeros"), bits) + (version == 1)  # (groups, rows)
    groups = read(f"{stem}.g_idx").long()
    scales = read(f"{stem}.scales").float()
    return ((values - zeros[groups].T).float() * scales[groups].T).contiguous()


def mlx(read: Read, stem: str, bits: int) -> Tensor:
    """One weight of an MLX file, float32 (rows, columns)."""
    scaled = _scaled(unpack(read(f"{stem}.weight"), bits), read(f"{stem}.scales"))
    biases = read(f"{stem}.biases").float()
    group = scaled.shape[1] // biases.shape[1]
    return scaled + biases.repeat_interleave(group, dim=1)


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    group = values.shape[1] // scales.shape[1]
    return values.float() * scales.float().repeat_interleave(group, dim=1)
