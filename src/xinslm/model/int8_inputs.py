"""Products of quantized weights with inputs that are rounded to 8 bits on the fly (W4A8, W8A8), as
llama.cpp computes them on a CPU; the reference for kernels that do the same.

A row of inputs is cut into blocks of 32. A block's scale is its largest magnitude / 127, in
float16; its codes are round(input * 127 / largest), halves to even, with the float32 largest
magnitude and not the rounded scale. This is llama.cpp's `quantize_row_q8_0` on x86, bit for bit.
Its portable `quantize_row_q8_0_ref` multiplies with 1 / (largest / 127) and rounds halves away from
zero, its ARM version multiplies with that and rounds halves to even, so a code near a tie may
differ by one there.

    output = sum over blocks of (weight scale * input scale * sum of weight code * input code)

It is computed in float64 from the dequantized factors, which float32 holds exactly: 11 bits of
scale and at most 8 of code. Products have at most 38 bits, so they are exact. So is the sum of a
block, an integer below 2^19 times a scale product of 22 bits. What rounds is the sum over blocks,
at 2^-53, and the result, once, to float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.errors import UsageError
from xinslm.model.grids import BLOCK, decode

_CHUNK_WEIGHTS = 1 << 20
"""Weights in float64 at once: 8 MB."""


def quantize_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., columns) in [-127, 127] and scales (..., columns / 32) of float32 inputs.

    Codes are float32, so that NaN stays: a block with NaN has it in its scale and in that code. A
    block whose scale is 0 in float16 (largest magnitude up to 3.7e-6) has codes 0. A block above
    8.3e6 has an infinite scale, as in llama.cpp.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    scales = (largest / 127).half().float()
    inverse = torch.full_like(largest, 127) / largest  # 127 / largest would be rounded twice
    codes = torch.where(scales == 0, 0.0, (blocks * inverse).round())
    return codes.flatten(-2), scales.squeeze(-1)


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs (..., columns), rounded to int8 blocks, times float32 weights (rows, columns) that are
    dequantized from codes in blocks of 32: (..., rows) in x's dtype. NaN in a row of x makes its
    outputs NaN.
    """
    if x.device.type == "mps":
        raise UsageError("--activations int8 needs float64, which MPS lacks; pass --device cpu")
    rounded = decode(*quantize_inputs(x)).double()
    chunks = weight.split(max(1, _CHUNK_WEIGHTS // weight.shape[1]))
    return torch.cat([F.linear(rounded, part.double()).to(x.dtype) for part in chunks], dim=-1)
