"""bfloat16 weights that learn: updates are rounded up or down at random, so that the mean is exact.

A bfloat16 weight has 8 bits of precision. Rounding to nearest loses every step below half of its
last bit, and training stalls. Rounding up with the probability of the part that is cut off (Gupta
et al., arXiv:1502.02551) keeps small steps on average. The random bits follow from the seed, the
step and the weight's number, so a continued run draws the same ones.
"""

import numpy as np
import torch
from torch import Tensor


class RandomBits:
    """An endless run of random 16-bit numbers, the same for the same key on the same kind of
    device.
    """

    def __init__(self, key: tuple[int, ...], device: torch.device) -> None:
        self.device = device
        sequence = np.random.SeedSequence(key)
        if device.type == "cpu":
            # much faster than PyTorch's
            self._numpy = np.random.Generator(np.random.SFC64(sequence))
        else:
            state = sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)
            self._torch = torch.Generator(device).manual_seed(int(state))

    def draw(self, count: int) -> Tensor:
        """(count,) int32 in 0..65535."""
        if self.device.type == "cpu":
            words = self._numpy.bit_generator.random_raw(-(-count // 4))
            return torch.from_numpy(words.view(np.uint16)[:count].astype(np.int32))
        return torch.randint(
            0, 1 << 16, (count,), dtype=torch.int32, device=self.device, generator=self._torch
        )


def round_into(target: Tensor, values: Tensor, bits: RandomBits) -> None:
    """Write `values` (n,) float32, which are finite, into `target` (n,) bfloat16, rounded by
    chance.
    """
    raised = values.view(torch.int32) + bits.draw(len(values))
    target.view(torch.int16).copy_(raised.bitwise_right_shift_(16))
