"""Fewer query heads, and fewer key-value heads under those that stay.

Query heads stay by the mean square of what they add to the residual stream. Where their key-value
heads outnumber the student's, groups of those become one. What the rotary embedding leaves free
decides how: a key may be turned and scaled pair by pair of channels, the query heads taking the
inverse, so that one key stands for a group best along the strongest direction of each pair's
complex products; values have no such tie, and any basis of the head's width may be taken: the
group's strongest directions. Both are exact where the group's heads agree. Mean pooling
(arXiv:2305.13245, section 2.1) adds up heads whose bases have nothing to do with each other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xinslm.model.config import ModelConfig
from xinslm.prune.cuts import Weights
from xinslm.prune.measure import LayerStatistics
from xinslm.prune.shape import merged_heads


@dataclass(frozen=True)
class Group:
    """One key-value head of the student: the teacher's that it is made of, and the query heads that
    read it.
    """

    key_values: tuple[int, ...]
    queries: tuple[int, ...]


def head_importance(layer: Weights, heads: Tensor) -> Tensor:
    """Sum of squares that each query head adds to the stream, (heads,)."""
    count, width, _ = heads.shape
    output = layer["self_attn.o_proj.weight"].cpu().double().view(-1, count, width)  # (d, H, D)
    return torch.einsum("dhi,hij,dhj->h", output, heads, output)


def choose_heads(
    teacher: ModelConfig, student: ModelConfig, layer: Weights, found: LayerStatistics
) -> list[Group]:
    """Which query heads stay, and on which key-value heads, most important first within what the
    shape allows.
    """
    importance = head_importance(layer, found.heads)
    shared = teacher.num_attention_heads // teacher.num_key_value_heads
    wanted = student.num_attention_heads // student.num_key_value_heads
    merged = merged_heads(teacher, student)
    by_group = importance.view(-1, shared)
    # Of merged heads all or nearly all queries stay; of a lone one the best.
    best = by_group.sort(descending=True).values[:, : -(-wanted // merged)].sum(1)
    kept = (
        best.argsort(descending=True, stable=True)[: merged * student.num_key_value_heads]
        .sort()
        .values.tolist()
    )
    groups = []
    for members in _alike(kept, merged, layer, found.inputs, teacher.head_dim):
        queries = [
            head for member in members for head in range(member * shared, (member + 1) * shared)
        ]
        queries = sorted(sorted(queries, key=lambda head: -importance[head].item())[:wanted])
        groups.append(Group(tuple(members), tuple(queries)))
    return groups


def _alike(
    kept: list[int], size: int, layer: Weights, inputs: Tensor, width: int
) -> list[list[int]]:
    """Put heads into groups of `size`: each time the first left and those whose merger with it
    keeps the most.
    """
    left, groups = list(kept), []
    keys, values = (
        _per_head(layer["self_attn.k_proj.weight"], width),
        _per_head(layer["self_attn.v_proj.weight"], width),
    )
    while left:
        first = left.pop(0)

        def kept_share(other: int, first: int = first) -> float:
            pair, ones = [first, other], torch.ones(2, dtype=torch.float64)
            return (
                _merge_keys(keys[pair], inputs, ones.expand(width // 2, 2))[2]
                + _merge_values(values[pair], inputs, ones)[2]
            )

        others = sorted(left, key=lambda other: -kept_share(other))[: size - 1] if size > 1 else []
        left = [head for head in left if head not in others]
        groups.append(sorted([first, *others]))
    return groups


def keep_heads(layer: Weights, groups: list[Group], inputs: Tensor, width: int) -> Weights:
    """One layer's attention with the heads of `groups` alone, their key-value heads merged."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    q, k, v = (_per_head(layer[f"self_attn.{name}.weight"], width) for name in names[:3])
    o = _per_head(layer["self_attn.o_proj.weight"].T, width)  # (H, D, d)
    queries, keys, values, outputs = [], [], [], []
    shared = len(q) // len(k)
    for group in groups:
        members, heads = list(group.key_values), list(group.queries)
        owner = torch.tensor([members.index(head // shared) for head in heads])
        if len(members) == 1:
            turned, key, value, output = q[heads], k[members[0]], v[members[0]], o[heads]
        else:
            size = torch.zeros(len(members), width // 2, dtype=torch.float64)
            size.index_add_(0, owner, _complex(q[heads]).abs().pow(2).sum(-1))
            key, turns, _ = _merge_keys(k[members], inputs, size.T)
            turned = _real(_complex(q[heads]) * turns[owner].conj()[:, :, None])
            size = torch.zeros(len(members), dtype=torch.float64)
            size.index_add_(0, owner, o[heads].pow(2).sum((1, 2)))
            value, bases, _ = _merge_values(v[members], inputs, size)
            output = bases[owner].transpose(1, 2) @ o[heads]
        queries.append(turned)
        keys.append(key[None])
        values.append(value[None])
        outputs.append(output)
    like = layer["self_attn.q_proj.weight"]
    parts = [torch.cat(part).flatten(0, 1).to(like) for part in (queries, keys, values, outputs)]
    parts[3] = parts[3].T.contiguous()
    return {f"self_attn.{name}.weight": part for name, part in zip(names, parts, strict=True)}


def _per_head(weight: Tensor, width: int) -> Tensor:
    return weight.cpu().double().reshape(-1, width, weight.shape[1])


def _complex(heads: Tensor) -> Tensor:
    """(..., D, d) -> (..., D/2, d): the pairs (i, i + D/2) that the rotary embedding turns, as
    complex numbers.
    """
    half = heads.shape[-2] // 2
    return torch.complex(heads[..., :half, :], heads[..., half:, :])


def _real(pairs: Tensor) -> Tensor:
    return torch.cat((pairs.real, pairs.imag), dim=-2)


def _merge_keys(keys: Tensor, inputs: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, float]:
    """One key head (D, d) for m of them (m, D, d), the factors (m, D/2) that give each back, the
    share kept.

    `sizes` (D/2, m) weigh each head's pairs: by the squares of the queries that read them.
    """
    weight = sizes.clamp_min(1e-12 * sizes.max().clamp_min(1e-300)).sqrt()
    scaled = _complex(keys).transpose(0, 1) * weight[:, :, None]  # (D/2, m, d)
    strength, directions = torch.linalg.eigh(scaled @ inputs.to(scaled.dtype) @ scaled.mH)
    top = directions[:, :, -1]  # (D/2, m)
    merged = (top.conj()[:, None, :] @ scaled)[:, 0]
    factors = top / weight
    size = factors.abs().mean(1, keepdim=True).clamp_min(1e-300)
    share = float(strength[:, -1].sum() / strength.sum().clamp_min(1e-300))
    return _real(merged * size), (factors / size).T, share


def _merge_values(values: Tensor, inputs: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, float]:
    """One value head (D, d) for m of them (m, D, d), the matrices (m, D, D) that give each back,
    the share kept.
    """
    count, width, _ = values.shape
    weight = sizes.clamp_min(1e-12 * sizes.max().clamp_min(1e-300)).sqrt()[:, None, None]
    scaled = (values * weight).flatten(0, 1)
    strength, directions = torch.linalg.eigh(scaled @ inputs @ scaled.T)
    top = directions[:, -width:]  # (mD, D)
    size = weight.mean()
    bases = top.reshape(count, width, width) / weight * size
    return (
        top.T @ scaled / size,
        bases,
        float(strength[-width:].sum() / strength.sum().clamp_min(1e-300)),
    )
