"""Values that are not finite, wherever they are, in every type that a model file has."""

import pytest
import torch

from xinslm.model.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_one_odd_value_is_found_anywhere(dtype, odd) -> None:
    largest = torch.finfo(dtype).max
    values = torch.full((37, 129), largest, dtype=dtype)
    values[::2] = -largest
    assert all_finite(values)
    for place in (0, 1, 64, 2000, values.numel() - 1):
        broken = values.clone()
        broken.view(-1)[place] = odd
        assert not all_finite(broken)
        assert not all_finite(broken.T)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.zeros(0, 5))
