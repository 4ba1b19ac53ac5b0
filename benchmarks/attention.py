"""Attention by tiles against PyTorch's, forward and backward, on packed and on whole rows.

    python benchmarks/attention.py

Both sides compute the same rows in turn, in float32; outputs and gradients are compared first.
PyTorch gets an additive mask for packed rows and `is_causal` for one document. Milliseconds are
medians; the shapes are SmolLM2-135M's (9 heads on 3, size 64) and others.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor

from xinslm.model.attention import attend, cut_into_tiles
from xinslm.precision import use_fast_float32

CASES = [
    # rows, heads, key heads, size, documents
    (4, 9, 3, 64, [150, 120, 170, 72]),
    (4, 9, 3, 64, [60] * 8 + [32]),
    (4, 9, 3, 64, [512]),
    (8, 4, 2, 32, [200, 56]),
    (1, 9, 3, 64, [2048]),
    (1, 32, 8, 64, [1024]),
]


def timed(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[list[float], list]:
    """Seconds forward and backward, and the output with the gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    began = time.perf_counter()
    y = function(*leaves)
    middle = time.perf_counter()
    upstream = torch.ones_like(y)
    begun = time.perf_counter()
    y.backward(upstream)
    seconds = [middle - began, time.perf_counter() - begun]
    return seconds, [y.detach(), *(x.grad for x in leaves)]


def compare(
    rows: int, heads: int, shared: int, size: int, documents: list[int], rounds: int
) -> str:
    """A line of the table."""
    length = sum(documents)
    make = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(rows, length, count, size, generator=make).transpose(1, 2)
        for count in (heads, shared, shared)
    ]
    number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    order = torch.arange(length)
    seen = (number[:, None] == number) & (order <= order[:, None])
    mask = torch.zeros(rows, 1, length, length).masked_fill_(~seen, -torch.inf)
    if len(documents) == 1:
        mask = None
    tiles = cut_into_tiles([documents] * rows, None, heads)
    sides = {
        "PyTorch": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=True
        ),
        "tiles": lambda q, k, v: attend(q, k, v, tiles),
    }
    found = [timed(side, tensors)[1] for side in sides.values()]
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(timed(side, tensors)[0])
    cells, totals = [], []
    for times in seconds.values():
        forward, backward = (1e3 * statistics.median(x) for x in zip(*times, strict=True))
        cells.append(f"{forward:.1f} + {backward:.1f}")
        totals.append(forward + backward)
    shape = f"{rows} x {length}, {heads} heads on {shared}, {len(documents)} documents"
    return f"| {shape} | {' | '.join(cells)} | {totals[0] / totals[1]:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    use_fast_float32()
    print(describe())
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(
            f"\nthreads: {threads}\n\n| rows | PyTorch, ms | tiles, ms | ratio |\n|---|---|---|---|"
        )
        for case in CASES:
            print(compare(*case, args.rounds), flush=True)


if __name__ == "__main__":
    main()
