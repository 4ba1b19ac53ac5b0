"""8-bit states and rounding by chance: error bounds, means over seeds, the traps of zero."""

import math

import pytest
import torch

from xinslm.train.blockwise_8bit import (
    BLOCK,
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
    num_blocks,
)
from xinslm.train.stochastic_rounding import RandomBits, round_into

CPU = torch.device("cpu")


def spread(count: int, seed: int = 0) -> torch.Tensor:
    """Numbers over eight decades with both signs, the way gradients lie: many small, few large."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * 10 ** (
        -4 * torch.rand(count, generator=generator)
    )


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_codes_stay_within_half_a_step_of_their_map(count: int) -> None:
    x = spread(count)
    largest = torch.cat([part.abs().amax().expand(len(part)) for part in x.split(BLOCK)])
    codes, scales = encode_signed(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and len(scales) == num_blocks(count)
    back = decode_signed(codes, scales)
    root = (x.abs() / largest).sqrt()
    assert ((back.abs() / largest).sqrt() - root).abs().max() <= 0.5 / 127 + 1e-5
    assert bool((back * x >= 0).all()), "no number changes its sign"

    codes, scales = encode_positive(x**2)
    assert (
        codes.dtype == torch.uint8 and codes.shape == x.shape and len(scales) == num_blocks(count)
    )
    back = decode_positive(codes, scales)
    root = (x**2 / largest**2) ** 0.25
    bound = torch.where(root < 1 / 255, 1 / 255, 0.5 / 255) + 1e-5
    assert bool((((back / largest**2) ** 0.25 - root).abs() <= bound).all())


def test_a_second_moment_above_zero_never_becomes_zero() -> None:
    x = torch.full((BLOCK,), 1e-14)
    x[0], x[1] = 1.0, 0.0
    back = decode_positive(*encode_positive(x))
    assert back[0] == 1 and back[1] == 0 and bool((back[2:] > 0).all())
    for encode, decode in ((encode_signed, decode_signed), (encode_positive, decode_positive)):
        assert torch.equal(decode(*encode(torch.zeros(300))), torch.zeros(300))


def test_moments_of_real_width_keep_two_digits() -> None:
    """Root-mean-square error relative to the block's root mean square, on Gaussian moments."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(3))
    assert (decode_signed(*encode_signed(x)) - x).pow(2).mean().sqrt() < 0.01
    second = x**2
    steps = decode_positive(*encode_positive(second)).sqrt()
    assert (steps - second.sqrt()).pow(2).mean().sqrt() < 0.01


def test_rounding_by_chance_is_right_on_average_and_never_off_by_more_than_a_step() -> None:
    x = torch.tensor([1.0 + 1 / 1024, -1.0 - 3 / 1024, 0.3, -7e-5, 1.0, 0.0, -2.0, 65504.7])
    many, total = 4000, torch.zeros(len(x), dtype=torch.float64)
    target = torch.empty(len(x), dtype=torch.bfloat16)
    exact = x.bfloat16().float() == x
    for seed in range(many):
        round_into(target, x, RandomBits((seed, 1, 2), CPU))
        off = (target.float() - x).abs()
        assert bool((off < x.abs() * 2**-7 + 1e-30).all()) and bool((off[exact] == 0).all())
        total += target.double()
    step = x.double().abs() * 2**-7
    assert bool(((total / many - x.double()).abs() <= 4 * step / math.sqrt(many)).all())


def test_random_bits_follow_from_the_key_alone_and_fill_their_range() -> None:
    def draw(*key: int) -> torch.Tensor:
        bits = RandomBits(key, CPU)
        return torch.cat([bits.draw(1001), bits.draw(40_000)])

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    assert not torch.equal(draw(1, 2, 3), draw(1, 3, 3)) and not torch.equal(
        draw(1, 2, 3), draw(1, 2, 4)
    )
    bits = draw(7, 7, 7)
    assert 0 <= bits.min() < 100 and 65435 < bits.max() < 65536
    assert abs(bits.double().mean() - 32767.5) < 5 * 65536 / math.sqrt(12 * len(bits))
