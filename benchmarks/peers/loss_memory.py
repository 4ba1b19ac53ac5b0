"""Peak memory and time of one loss with its backward pass, from hidden states on; prints one JSON
line.

    PYTHON loss_memory.py SIDE --rows 2048 --student 256 --teacher 512 --vocabulary 32000

SIDE: `xinslm` (sparse targets), `xinslm-dense` (live teacher), `gkd` and `trl-distillation` (TRL
1.16's two losses), `top-k` (renormalised top-128 on whole logits, as DistillKit and axolotl
formulate it). Linux only: the peak is reset through /proc before the loss begins, and what stood
before it is taken off.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F


def peak_kib() -> int:
    """Largest resident memory since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def make(side: str, rows: int, student: int, teacher: int, vocabulary: int):
    """Inputs of a side, and the function that computes its loss from them."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, student, requires_grad=True)
    weight = (torch.randn(vocabulary, student) * 0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,))
    states, head = torch.randn(rows, teacher), torch.randn(vocabulary, teacher) * 0.02
    if side == "gkd":
        from trl.experimental.gkd import GKDTrainer

        def loss():
            with torch.no_grad():
                theirs = F.linear(states, head)[None]
            return GKDTrainer.generalized_jsd_loss(
                F.linear(hidden, weight)[None], theirs, labels=labels[None], beta=0.0
            )
    elif side == "trl-distillation":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def loss():
            return ChunkedDivergenceFunction.apply(hidden, weight, None, states, head, None, 0.0)[
                0
            ].mean()
    elif side == "top-k":
        ids = torch.rand(rows, vocabulary).topk(128).indices
        target = torch.rand(rows, 128).softmax(1)

        def loss():
            log_q = torch.log_softmax(F.linear(hidden, weight).float().gather(1, ids), dim=1)
            return (target * (target.log() - log_q)).sum(1).mean()
    else:
        from xinslm.losses.config import LossConfig
        from xinslm.losses.fused import fused_loss
        from xinslm.losses.targets import DenseTargets, SparseTargets

        chosen = torch.rand(rows, 64 * vocabulary // vocabulary).argsort(1)[:, :12]
        probs = torch.full((rows, 8), 0.1).log()
        sparse = SparseTargets(
            chosen[:, :8],
            probs,
            torch.full((rows,), 0.2).log(),
            chosen[:, 8:],
            torch.full((rows,), 4),
            torch.zeros(rows),
            torch.ones(rows, dtype=torch.bool),
        )
        dense = DenseTargets(lambda part: F.linear(states[part], head))

        def loss():
            targets = sparse if side == "xinslm" else dense
            return fused_loss(hidden, weight, labels, targets, LossConfig(0.1, 0.9))[0]

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "side", choices=["xinslm", "xinslm-dense", "gkd", "trl-distillation", "top-k"]
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--student", type=int, default=256)
    parser.add_argument("--teacher", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = (args.student, args.teacher, args.vocabulary)
    make(args.side, 16, *sizes)().backward()  # libraries load, threads start
    loss = make(args.side, args.rows, *sizes)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    seconds = []
    for number in range(args.repeats):
        began = time.perf_counter()
        loss().backward()
        seconds.append(time.perf_counter() - began)
        if number == 0:
            mib = (peak_kib() - before) / 1024
    print(json.dumps({"mib": mib, "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2]}))


if __name__ == "__main__":
    main()
