"""How far a cached teacher's logit gradient is from the dense one, for our losses and for
renormalised top-k.

    python benchmarks/loss_accuracy.py --data ../shared/data [--student FOLDER] [--work /tmp/core]

A real teacher (stories5M) reads held-out stories; its distributions go through the cache's own
records. The figure is |g - g_dense| / |g_dense| over all positions (relative RMSE), against the
dense definition of the same loss. Students of three ages: random weights, and the teacher with
noise on its weights (much, little). Markdown table at the end.
"""

import argparse
import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from sides import keep
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from xinslm.cache.entries import CacheFormat, decode, encode
from xinslm.cache.entry_files import SparseLayout
from xinslm.losses.chunk import chunk_loss
from xinslm.losses.config import LossConfig
from xinslm.losses.targets import SparseTargets

PRESETS = {
    "lean": (4, 0.04),
    "default": (4, 0.02),
    "rich": (8, 0.01),
    "11 and no tail samples": (11, 0),
    "20 and no tail samples": (20, 0),
    "50 and no tail samples": (50, 0),
}
"""Top-k tokens and tail samples."""
PEER_K = (8, 12, 50, 128)


def read_logits(model: torch.nn.Module, documents: list[list[int]]) -> Tensor:
    """Logits of each position that has a next token, (N, V)."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0, :-1] for ids in documents])


def noisy(model: torch.nn.Module, amount: float) -> torch.nn.Module:
    """A copy with Gaussian noise of `amount` times each matrix's own deviation."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * amount)
    return other


def gradient(
    z: Tensor, labels: Tensor, targets: SparseTargets | Tensor, config: LossConfig
) -> Tensor:
    """The logit gradient of KD alone."""
    g = z.clone()
    chunk_loss(g, labels, targets, config)
    return g


def decoupled(z: Tensor, teacher: Tensor, top_k_ids: Tensor, t: float) -> Tensor:
    """Dense definition of `decoupled`: exact masses of head and tail, exact head at T, by
    autograd.
    """
    leaf = z.clone().requires_grad_()
    q, p = leaf.softmax(1), teacher.softmax(1)
    q_mass, mass = q.gather(1, top_k_ids).sum(1), p.gather(1, top_k_ids).sum(1)
    split = mass * (mass / q_mass).log() + (1 - mass) * ((1 - mass) / (1 - q_mass)).log()
    log_p = (teacher.gather(1, top_k_ids) / t).log_softmax(1)
    log_q = (leaf.gather(1, top_k_ids) / t).log_softmax(1)
    (split + mass * t * t * (log_p.exp() * (log_p - log_q)).sum(1)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def renormalised(z: Tensor, teacher: Tensor, k: int, t: float) -> Tensor:
    """Gradient of T^2 KL(p~ || q), p~ the teacher's k most likely tokens scaled to 1 at temperature
    T.
    """
    top = teacher.topk(k, dim=1)
    return t * ((z / t).softmax(1).scatter_add(1, top.indices, -(top.values / t).softmax(1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument(
        "--student", help="a trained student of the same vocabulary, instead of the noisy teachers"
    )
    parser.add_argument("--stories", type=int, default=12)
    parser.add_argument("--work", type=Path, help="where the figures of the table are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.data / "models" / "stories5M"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with gzip.open(args.data / "text" / "stories_valid.jsonl.gz", "rt") as lines:
        texts = [
            json.loads(line)["text"] for line, _ in zip(lines, range(args.stories), strict=False)
        ]
    documents = [
        ([tokenizer.bos_token_id or 0, *tokenizer(t, add_special_tokens=False).input_ids])[:256]
        for t in texts
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    teacher = read_logits(model, documents)
    labels = torch.cat([torch.tensor(ids[1:]) for ids in documents])
    torch.manual_seed(0)
    students = {"random": AutoModelForCausalLM.from_config(model.config).eval()}
    if args.student:
        students["given"] = AutoModelForCausalLM.from_pretrained(
            args.student, dtype=torch.float32
        ).eval()
    else:
        students |= {"early": noisy(model, 0.5), "late": noisy(model, 0.2)}
    logits = {name: read_logits(student, documents) for name, student in students.items()}
    cross_entropy = {
        name: torch.nn.functional.cross_entropy(z, labels).item() for name, z in logits.items()
    }
    rows: dict[str, list[str]] = {}
    sizes: dict[str, str] = {}

    def error(
        row: str, ours: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor]
    ) -> None:
        rows[row] = [
            f"{((ours(z) - dense(z)).norm() / dense(z).norm()).item():.3f}" for z in logits.values()
        ]

    def kd(targets: SparseTargets | Tensor, *settings: object) -> Callable[[Tensor], Tensor]:
        return lambda z: gradient(z, labels, targets, LossConfig(0.0, 1.0, *settings))  # type: ignore[arg-type]

    for name, (top_k, sample_mass) in PRESETS.items():
        fmt = CacheFormat(teacher.shape[1], top_k, sample_mass, 2.0)
        entries = encode(teacher.softmax(1), labels, torch.arange(len(labels)), fmt, seed=0)
        cached = decode(entries, fmt)
        size = SparseLayout(fmt).stored.itemsize + 2 * float(entries["num_samples"].mean())
        sizes[name] = f"{size:.1f} bytes"
        size = f"{name}, {sizes[name]}"
        exact = teacher.topk(top_k, dim=1).indices
        if sample_mass:
            error(f"T=1, tail_weight 1 | {size}", kd(cached, 1.0, "decoupled", 1.0), kd(teacher))
        error(f"T=1, tail_weight 0 | {size}", kd(cached, 1.0, "decoupled", 0.0), kd(teacher))
        error(
            f"T=2 decoupled, tail_weight 0, its own definition | {size}",
            kd(cached, 2.0, "decoupled", 0.0),
            lambda z, ids=exact: decoupled(z, teacher, ids, 2.0),
        )
        error(f"T=2 full | {size}", kd(cached, 2.0, "full", 0.0), kd(teacher, 2.0))
    for t in (1.0, 2.0):
        for k in PEER_K:
            error(
                f"T={t:.0f}, top {k} renormalised | -",
                lambda z, k=k, t=t: renormalised(z, teacher, k, t),
                kd(teacher, t),
            )
    print(f"{describe()}; {len(labels):,} positions, vocabulary {teacher.shape[1]:,}\n")
    titles = [f"{name} student (CE {cross_entropy[name]:.2f})" for name in logits]
    print(f"| loss | cache | {' | '.join(titles)} |\n|---|---|{'---|' * len(titles)}")
    for row, values in rows.items():
        print(f"| {row} | {' | '.join(values)} |")
    if args.work:
        at_two = {
            f"{way}, {sizes[name]}": dict(
                zip(logits, map(float, rows[f"{row} | {name}, {sizes[name]}"]), strict=True)
            )
            for name, way, row in (
                ("11 and no tail samples", "full", "T=2 full"),
                ("20 and no tail samples", "full", "T=2 full"),
                ("default", "decoupled", "T=2 decoupled, tail_weight 0, its own definition"),
            )
        }
        keep(args.work, "gradient error at T=2", at_two)


if __name__ == "__main__":
    main()
