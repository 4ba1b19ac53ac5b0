"""Calibration text, the loss on it, and one pass through the teacher that measures what each part
contributes.

Sums of products are computed in float32 on the device and kept in float64 on the CPU, without
padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xinslm.data.dataset import Split
from xinslm.data.packing import PackedDataset
from xinslm.model.transformer import Block, Transformer

_TOKENS_A_PASSAGE = 4096
_CHUNK_LOGITS = 1 << 24  # 64 MB of float32


@dataclass(frozen=True)
class Passage:
    """Some packed rows on the device; each (rows, length)."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    compute_dtype: torch.dtype = torch.float32
    """Type of the products in forward passes on this text."""

    def forward(self) -> torch.autocast:
        """Context for a forward pass."""
        reduced = self.compute_dtype != torch.float32
        return torch.autocast(
            self.ids.device.type, self.compute_dtype if reduced else None, enabled=reduced
        )

    @property
    def real(self) -> Tensor:
        """Positions that are not padding."""
        return self.segments >= 0


def read_passages(
    split: Split,
    length: int,
    chosen: np.ndarray | None,
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
) -> list[Passage]:
    """Pack a split into rows of `length` and give those of the indices `chosen`, all if None."""
    rows = PackedDataset(split, length)
    indices = np.arange(len(rows)) if chosen is None else np.sort(chosen)
    step = max(1, _TOKENS_A_PASSAGE // length)
    passages = []
    for at in range(0, len(indices), step):
        batch = rows.batch(indices[at : at + step])
        arrays = (batch.input_ids, batch.labels, batch.positions, batch.segments)
        tensors = [torch.from_numpy(array).to(device) for array in arrays]
        ids, labels, positions, segments = tensors
        passages.append(Passage(ids, labels, positions, segments, compute_dtype))
    return passages


def loss(model: Transformer, passages: Sequence[Passage]) -> float:
    """Cross-entropy in nats per target token."""
    total, count = 0.0, 0
    for passage in passages:
        with passage.forward():
            hidden = model.hidden(passage.ids, passage.positions, passage.segments)
            total += sum_of_losses(model, hidden, passage)
        count += int((passage.labels >= 0).sum())
    return total / max(count, 1)


def sum_of_losses(model: Transformer, hidden: Tensor, passage: Passage) -> float:
    """Sum of the cross-entropy over the target tokens of a passage, from final hidden states."""
    targets = passage.labels >= 0
    rows = max(1, _CHUNK_LOGITS // model.config.vocab_size)
    pieces = zip(hidden[targets].split(rows), passage.labels[targets].split(rows), strict=True)
    return sum(
        F.cross_entropy(model.logits(states).float(), labels, reduction="sum").item()
        for states, labels in pieces
    )


def unit(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without its gain."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def mixed(model: Transformer, block: Block, normed: Tensor, passage: Passage) -> Tensor:
    """Input of the attention's output projection: (rows, length, heads * head_dim)."""
    cos, sin = model.rotary(passage.positions, normed.dtype)
    mask = model.attended(passage.ids, passage.segments)
    with passage.forward():
        return block.self_attn.mix(normed, cos, sin, mask, None).to(normed.dtype)


def neurons(block: Block, normed: Tensor, passage: Passage) -> Tensor:
    """Input of the feed-forward's output projection."""
    with passage.forward():
        active = F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)
    return active.to(normed.dtype)


def advance(model: Transformer, block: Block, passage: Passage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run one block on states; return those after its attention and after its feed-forward."""
    out = mixed(model, block, block.input_layernorm(x), passage)
    with passage.forward():
        middle = x + block.self_attn.o_proj(out)
        return middle, middle + block.mlp(block.post_attention_layernorm(middle))


def products(a: Tensor, b: Tensor) -> Tensor:
    """(N, p) and (N, q) -> their sum of products (p, q), float64 on the CPU; never in bfloat16."""
    return (a.float().T @ b.float()).cpu().double()


@dataclass
class LayerStatistics:
    """Statistics of calibration text in one layer; sums over tokens, float64."""

    influence: float
    """Block influence, the mean of 1 - cos(input, output) (ShortGPT, arXiv:2403.03853)."""
    inputs: Tensor
    """Products of the normalized input of the attention, gain included, (hidden, hidden), with a
    column of ones behind it if the projections have biases; (0, 0) if not requested.
    """
    heads: Tensor
    """Products of each head's output, (heads, head_dim, head_dim)."""
    neurons: Tensor
    """Squares of each neuron's activation, (intermediate,)."""


@dataclass
class Statistics:
    """Statistics of calibration text in a model."""

    layers: list[LayerStatistics]
    stream: Tensor
    """Products of the residual stream, each token scaled to mean square 1, summed over the
    inputs of all norms.
    """
    final: Tensor
    """The same for the last norm, before the output head."""
    ids: Tensor
    """Count of each input token, (vocabulary,)."""


def measure(
    model: Transformer,
    passages: Sequence[Passage],
    on_layer: Callable[[int], None],
    with_inputs: bool = True,
    with_stream: bool = True,
) -> Statistics:
    """Run calibration text through `model`, layer by layer; only merging key-value heads needs
    `with_inputs`, and only cutting the width `with_stream`: without it the stream's products are 0.
    """
    config, eps = model.config, model.config.rms_norm_eps
    d = config.hidden_size
    stream = torch.zeros(d, d, dtype=torch.float64)
    ids = torch.zeros(config.vocab_size, dtype=torch.float64)
    states = [model.model.embed_tokens(passage.ids) for passage in passages]
    for passage in passages:
        ids += torch.bincount(passage.ids[passage.real].cpu(), minlength=config.vocab_size)
    layers, size = [], (d + config.attention_bias if with_inputs else 0)
    for index, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        found = LayerStatistics(
            0.0,
            torch.zeros(size, size, dtype=torch.float64),
            torch.zeros(
                config.num_attention_heads, config.head_dim, config.head_dim, dtype=torch.float64
            ),
            torch.zeros(config.intermediate_size, dtype=torch.float64),
        )
        count = 0
        for at, passage in enumerate(passages):
            real, x = passage.real, states[at]
            normed = block.input_layernorm(x)
            out = mixed(model, block, normed, passage)
            with passage.forward():
                middle = x + block.self_attn.o_proj(out)
            active = neurons(block, block.post_attention_layernorm(middle), passage)
            with passage.forward():
                states[at] = middle + block.mlp.down_proj(active)
            by_head = out[real].view(-1, config.num_attention_heads, config.head_dim)
            found.heads += torch.einsum("nhi,nhj->hij", by_head, by_head).cpu().double()
            if with_inputs:
                seen = F.pad(normed[real], (0, size - d), value=1.0)
                found.inputs += products(seen, seen)
            found.neurons += active[real].pow(2).sum(0).cpu().double()
            found.influence += float(
                (1 - F.cosine_similarity(x[real], states[at][real], dim=-1)).sum()
            )
            count += int(real.sum())
            for place in (x[real], middle[real]) if with_stream else ():
                stream += products(unit(place, eps), unit(place, eps))
        found.influence /= max(count, 1)
        layers.append(found)
        on_layer(index + 1)
    final = torch.zeros_like(stream)
    for passage, x in zip(passages, states, strict=True) if with_stream else ():
        last = unit(x[passage.real], eps)
        final += products(last, last)
    return Statistics(layers, stream + final, final, ids)
