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
    """The codes in words (rows, n), int32 or uint32: int16 (rows, n * 32 / bits); 2, 4 or 8 bits.

    The first code is in the lowest bits, so codes are in the order of the words' bytes.
    """
    values = words.contiguous().view(torch.int32).numpy().astype("<i4", copy=False)
    octets, count = values.view(np.uint8), 8 // bits
    codes = np.empty((*octets.shape, count), np.int16)
    for place in range(count):
        codes[..., place] = (octets >> (place * bits)) & ((1 << bits) - 1)
    return torch.from_numpy(codes.reshape(*values.shape[:-1], -1))


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
    size = len(groups) // max(1, len(scales))
    if len(groups) == size * len(scales) and torch.equal(groups, torch.arange(len(groups)) // size):
        signed = values.unflatten(1, (-1, size)) - zeros.T[..., None]
        return _scaled(signed.flatten(1), scales.T)
    return ((values - zeros[groups].T).float() * scales[groups].T).contiguous()


def mlx(read: Read, stem: str, bits: int) -> Tensor:
    """One weight of an MLX file, float32 (rows, columns)."""
    scaled = _scaled(unpack(read(f"{stem}.weight"), bits), read(f"{stem}.scales"))
    biases = read(f"{stem}.biases").float()
    scaled.unflatten(1, (biases.shape[1], -1)).add_(biases[..., None])
    return scaled


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """Each value times the scale of its group, in the memory of the result."""
    result = values.to(torch.float32, copy=True)
    result.unflatten(1, (scales.shape[1], -1)).mul_(scales.float()[..., None])
    return result
