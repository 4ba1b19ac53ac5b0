"""Pruning of query heads, and merging of their key-value heads.

Query heads are ranked by the mean square of their contribution to the residual stream. If the
remaining ones have more key-value heads than the student, groups of key-value heads are merged:

- Keys: the rotary embedding allows a rotation and a scale for each pair of channels, and the query
  heads take the inverse. The merged key is the strongest direction of each pair's complex products.
- Values: any basis of the head's width is allowed; the group's strongest directions are taken.

Both are exact if the heads of the group agree. Mean pooling (arXiv:2305.13245, section 2.1) adds
heads whose bases are unrelated. A bias is one more column, whose input is always 1.
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
    """One key-value head of the student: the teacher's heads that are merged into it, and the
    query heads that read it.
    """

    key_values: tuple[int, ...]
    queries: tuple[int, ...]


def head_importance(layer: Weights, heads: Tensor) -> Tensor:
    """Sum of squares that each query head adds to the residual stream, (heads,)."""
    count, width, _ = heads.shape
    output = layer["self_attn.o_proj.weight"].cpu().double().view(-1, count, width)  # (d, H, D)
    return torch.einsum("dhi,hij,dhj->h", output, heads, output)


def choose_heads(
    teacher: ModelConfig, student: ModelConfig, layer: Weights, found: LayerStatistics
) -> list[Group]:
    """Choose the most important query heads that the shape allows, and group their key-value
    heads.
    """
    importance = head_importance(layer, found.heads)
    shared = teacher.num_attention_heads // teacher.num_key_value_heads
    wanted = student.num_attention_heads // student.num_key_value_heads
    merged = merged_heads(teacher, student)
    by_group = importance.view(-1, shared)
    # Merged heads keep all or nearly all their queries; a single head keeps its best.
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
    """Put heads into groups of `size`: the first remaining head and those that lose least when
    merged with it.
    """
    left, groups = list(kept), []
    keys, values = (_per_head(_with_bias(layer, name), width) for name in ("k_proj", "v_proj"))
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
    """Return one layer's attention with only the heads of `groups`, key-value heads merged.

    Norms of heads and the bias of the output stay as they are, so they are not among the results.
    """
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    q, k, v = (_per_head(_with_bias(layer, name), width) for name in names[:3])
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
    made = {f"self_attn.{name}.weight": part for name, part in zip(names, parts, strict=True)}
    for name in names[:3]:
        if f"self_attn.{name}.bias" in layer:
            joined = made[f"self_attn.{name}.weight"]
            made[f"self_attn.{name}.weight"] = joined[:, :-1].contiguous()
            made[f"self_attn.{name}.bias"] = joined[:, -1].contiguous()
    return made


def _with_bias(layer: Weights, name: str) -> Tensor:
    """A projection's weight (rows, d), or (rows, d + 1) with its bias as the last column."""
    weight, bias = layer[f"self_attn.{name}.weight"], layer.get(f"self_attn.{name}.bias")
    return weight if bias is None else torch.cat((weight, bias[:, None].to(weight)), dim=1)


def _per_head(weight: Tensor, width: int) -> Tensor:
    return weight.cpu().double().reshape(-1, width, weight.shape[1])


def _complex(heads: Tensor) -> Tensor:
    """(..., D, d) -> (..., D/2, d): the pairs (i, i + D/2) that the rotary embedding rotates, as
    complex numbers.
    """
    half = heads.shape[-2] // 2
    return torch.complex(heads[..., :half, :], heads[..., half:, :])


def _real(pairs: Tensor) -> Tensor:
    return torch.cat((pairs.real, pairs.imag), dim=-2)


def _merge_keys(keys: Tensor, inputs: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, float]:
    """Merge m key heads (m, D, d): return one head (D, d), the factors (m, D/2) that reconstruct
    each, and the share of the sum of squares kept.

    `sizes` (D/2, m) weight each head's pairs: the squares of the queries that read them.
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
    """Merge m value heads (m, D, d): return one head (D, d), the matrices (m, D, D) that
    reconstruct each, and the share of the sum of squares kept.
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
