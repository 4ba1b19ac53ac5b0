"""Inputs and weights of linear layers, for tests of quantization."""

import torch
from torch import Tensor


def correlated_inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs (tokens, columns) that are correlated, of very different variances."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) @ mix * spread


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Normal weights (rows, columns) of deviation .1."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
