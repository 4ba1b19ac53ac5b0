"""Cut the width of the residual stream, and fit the remaining weights to the teacher's activations.

RMSNorm without its gain commutes with rotations (SliceGPT, arXiv:2401.15024, section 3). The
residual stream is rotated to its principal directions, the first ones are kept, and the gains are
folded into the matrices that follow. All layers share one rotation, because LLaMA's skip
connections have no matrix that could change from one to another.

Then each matrix is fitted by least squares to the teacher's activations, in forward order. Matrices
that read a norm learn to give from the student's state what they gave from the teacher's. Matrices
that write to the residual stream learn to bring the student's state to the teacher's, after any
dropped layers that follow. The fit is regularized towards the cut weights, so a small amount of
text changes little.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xinslm.model.config import ModelConfig
from xinslm.model.rms_norm import RMSNorm
from xinslm.model.transformer import Block, Transformer
from xinslm.prune.cuts import EMBEDDING, HEAD, NORM, Weights, assemble
from xinslm.prune.measure import Passage, Statistics, advance, mixed, neurons, products, unit

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_INSIDE = (
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
)
"""Vectors of a block, if the model has them, that do not meet the residual stream."""


def principal_directions(stream: Tensor, width: int) -> Tensor:
    """Return the `width` leading eigenvectors of products (d, d): orthonormal columns (d, width),
    float64.
    """
    return torch.linalg.eigh(stream).eigenvectors.flip(1)[:, :width]


def norm_factor(products_of_stream: Tensor, basis: Tensor) -> float:
    """Return the factor that corrects a norm of the narrow state.

    RMSNorm then divides by the mean square over fewer channels, which hold most of the sum of
    squares.
    """
    wide = products_of_stream.trace() / len(products_of_stream)
    narrow = (basis * (products_of_stream @ basis)).sum() / basis.shape[1]
    return math.sqrt(float(narrow / wide))


def narrow(
    thin: Transformer, student: ModelConfig, basis: Tensor, statistics: Statistics
) -> Transformer:
    """Return `thin` in the coordinates of `basis` (d, width), gains folded into the matrices that
    follow them.
    """
    factor = norm_factor(statistics.stream, basis)
    source = thin.state_dict()
    like = source[EMBEDDING]
    turn = basis.to(like)
    weights: Weights = {EMBEDDING: source[EMBEDDING] @ turn}
    for layer in range(student.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm, readers in READERS.items():
            gain = source[f"{prefix}{norm}.weight"]
            scale = _scale(gain)
            weights[f"{prefix}{norm}.weight"] = torch.full_like(like[0, :1], scale * factor).repeat(
                turn.shape[1]
            )
            for reader in readers:
                weights[f"{prefix}{reader}.weight"] = (
                    (source[f"{prefix}{reader}.weight"] * gain) @ turn / scale
                )
        for writer in WRITERS:
            weights[f"{prefix}{writer}.weight"] = turn.T @ source[f"{prefix}{writer}.weight"]
            if (bias := source.get(f"{prefix}{writer}.bias")) is not None:
                weights[f"{prefix}{writer}.bias"] = bias @ turn
        for name in _INSIDE:
            if f"{prefix}{name}" in source:
                weights[f"{prefix}{name}"] = source[f"{prefix}{name}"]
    gain = source[NORM]
    factor = norm_factor(statistics.final, basis)
    if student.tie_word_embeddings:
        # The gain is not diagonal in the new coordinates: keep its diagonal, and fit the
        # embedding to the rest.
        diagonal = (basis.pow(2) * gain.cpu().double()[:, None]).sum(0)
        weights[NORM] = (diagonal * factor).to(like)
        weights[EMBEDDING] = _tied_embedding(
            source[EMBEDDING], gain, basis, diagonal, statistics
        ).to(like)
    else:
        scale = _scale(gain)
        weights[NORM] = torch.full_like(like[0, :1], scale * factor).repeat(turn.shape[1])
        weights[HEAD] = (thin.head_weight * gain) @ turn / scale
    return assemble(student, weights)


def _scale(gain: Tensor) -> float:
    return float(gain.pow(2).mean().sqrt().clamp_min(1e-6))


def _tied_embedding(
    embedding: Tensor, gain: Tensor, basis: Tensor, diagonal: Tensor, statistics: Statistics
) -> Tensor:
    """Fit one matrix as embedding and output head by least squares: to the rotated embedding and
    to the teacher's logits.

    Per unit of state, an error of the embedding has half the weight of one of the logits.
    """
    rows = embedding.cpu().double()
    final = statistics.final / statistics.ids.sum()
    seen = (basis.T @ final @ basis) * diagonal[:, None] * diagonal
    logits = (rows * gain.cpu().double()) @ final @ basis * diagonal  # (vocabulary, width)
    weight = 0.5 * seen.diagonal().mean()
    wanted = weight * rows @ basis + logits
    return torch.linalg.solve(seen + weight * torch.eye(len(seen), dtype=seen.dtype), wanted.T).T


class Fit:
    """Ridge regression of W x = t from sums of products, regularized towards a prior W."""

    def __init__(self) -> None:
        self._inputs: Tensor | float = 0.0
        self._targets: Tensor | float = 0.0

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add inputs (N, p) and targets (N, q)."""
        self._inputs = self._inputs + products(x, x)
        self._targets = self._targets + products(t, x)

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """Solve for W (q, p); `ridge` is a share of the inputs' mean square."""
        assert isinstance(self._inputs, Tensor) and isinstance(self._targets, Tensor), (
            "add comes first"
        )
        pull = ridge * self._inputs.diagonal().mean().clamp_min(1e-30)
        left = self._inputs + pull * torch.eye(len(self._inputs), dtype=torch.float64)
        right = self._targets + pull * prior.cpu().double()
        return torch.linalg.solve(left, right.T).T.to(prior)


@dataclass(frozen=True)
class CutModel:
    """A pruned model before and after its width is cut."""

    thin: Transformer
    """The layers `kept` with the remaining heads and neurons, at the teacher's width."""
    plain: Transformer
    """The same after `narrow`; without a `basis`, the same model."""
    kept: Sequence[int]
    basis: Tensor | None


def compensate(
    teacher: Transformer,
    cut: CutModel,
    passages: Sequence[Passage],
    ridge: float,
    on_layer: Callable[[int], None],
) -> Transformer:
    """Fit a copy of `cut.plain` to the teacher's activations, layer by layer."""
    fitting = _Fitting(teacher, cut, passages, ridge)
    ends = [*cut.kept[1:], teacher.config.num_hidden_layers]
    same = unchanged_blocks(teacher, cut)
    fitting.advance_teacher(range(same or cut.kept[0]))
    if same:  # their least squares would give back the same weights
        fitting.states = list(fitting.wide)
        on_layer(same)
    for index, (layer, end) in enumerate(zip(cut.kept, ends, strict=True)):
        if index >= same:
            fitting.fit_block(index, layer, end)
            on_layer(index + 1)
    fitting.fit_head()
    return fitting.student


def unchanged_blocks(teacher: Transformer, cut: CutModel) -> int:
    """Number of blocks, from the first, that are the teacher's with the teacher's states before and
    after them.
    """
    after = [*cut.kept[1:], teacher.config.num_hidden_layers]
    count = 0
    for index, (layer, end) in enumerate(zip(cut.kept, after, strict=True)):
        ours, theirs = _block(cut.thin, index).state_dict(), _block(teacher, layer).state_dict()
        whole = all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
        if cut.basis is not None or layer != index or end != index + 1 or not whole:
            break
        count += 1
    return count


class _Fitting:
    """A student whose matrices are fitted in the order in which states pass through them.

    `wide` and `states` hold the hidden states of teacher and student, one tensor a passage.
    """

    def __init__(
        self, teacher: Transformer, cut: CutModel, passages: Sequence[Passage], ridge: float
    ) -> None:
        self.teacher, self.thin, self.basis = teacher, cut.thin, cut.basis
        self.passages, self.ridge = passages, ridge
        weights = {name: tensor.clone() for name, tensor in cut.plain.state_dict().items()}
        self.student = assemble(cut.plain.config, weights)
        turn = torch.eye(cut.thin.config.hidden_size) if cut.basis is None else cut.basis
        self.turn = turn.to(weights[EMBEDDING])
        self.wide = [teacher.model.embed_tokens(passage.ids) for passage in passages]
        self.states = [self.student.model.embed_tokens(passage.ids) for passage in passages]

    def advance_teacher(self, layers: Iterable[int]) -> None:
        """Run the teacher's states through `layers`."""
        for layer in layers:
            block = _block(self.teacher, layer)
            self.wide = [
                advance(self.teacher, block, passage, x)[1]
                for passage, x in zip(self.passages, self.wide, strict=True)
            ]

    def fit_block(self, index: int, layer: int, end: int) -> None:
        """Fit the student's block `index` to the teacher's blocks from `layer` to before `end`."""
        block, source = _block(self.student, index), _block(self.teacher, layer)
        self._fit_readers(index, "input_layernorm", source.input_layernorm)
        middles, goals = [], []
        for passage, x in zip(self.passages, self.wide, strict=True):
            middle, goal = advance(self.teacher, source, passage, x)
            middles.append(middle)
            goals.append(goal)
        outputs = [
            mixed(self.student, block, block.input_layernorm(z), passage)
            for passage, z in zip(self.passages, self.states, strict=True)
        ]
        self._fit_writer(block.self_attn.o_proj, outputs, middles)
        self.wide = middles
        self._fit_readers(index, "post_attention_layernorm", source.post_attention_layernorm)
        self.wide = goals
        self.advance_teacher(range(layer + 1, end))
        outputs = [
            neurons(block, block.post_attention_layernorm(z), passage)
            for passage, z in zip(self.passages, self.states, strict=True)
        ]
        self._fit_writer(block.mlp.down_proj, outputs, self.wide)

    def fit_head(self) -> None:
        """Fit an output head that is not the embedding."""
        if not self.student.config.tie_word_embeddings:
            matrix = self._reading(self.teacher.model.norm, self.student.model.norm)
            self.student.lm_head.weight.copy_(self.thin.head_weight @ matrix)

    def _reading(self, source: RMSNorm, norm: RMSNorm) -> Tensor:
        """Fit the matrix (d, width) from the student's state to the teacher's normalized one."""
        fit = Fit()
        for passage, x, z in zip(self.passages, self.wide, self.states, strict=True):
            fit.add(norm(z[passage.real]), source(x[passage.real]))
        return fit.solve(self._reading_prior(source, norm), self.ridge)

    def _reading_prior(self, source: RMSNorm, norm: RMSNorm) -> Tensor:
        if self.basis is None:
            return torch.eye(len(source.weight)).to(source.weight)
        # `narrow` gives the narrow norm one number as its gain: `factor` absorbs it, and the wide
        # norm's gain is part of the prior.
        product = square = 0.0
        for passage, x, z in zip(self.passages, self.wide, self.states, strict=True):
            own = norm(z[passage.real])
            product += float((unit(x[passage.real], source.eps) @ self.turn * own).sum())
            square += float(own.pow(2).sum())
        return source.weight[:, None] * self.turn * (product / square)

    def _fit_readers(self, index: int, name: str, source: RMSNorm) -> None:
        """Fit the matrices that read the norm `name` of the student's block `index`."""
        block, origin = _block(self.student, index), _block(self.thin, index)
        norm = block.get_submodule(name)
        assert isinstance(norm, RMSNorm)
        matrix = self._reading(source, norm)
        for reader in READERS[name]:
            weight = origin.get_parameter(f"{reader}.weight")
            block.get_parameter(f"{reader}.weight").copy_(weight @ matrix)

    def _fit_writer(
        self, writer: torch.nn.Linear, outputs: list[Tensor], goals: list[Tensor]
    ) -> None:
        """Fit the matrix that adds `outputs` to the states so that they reach the goals; add
        them.
        """
        fit = Fit()
        for passage, x, goal, z in zip(self.passages, outputs, goals, self.states, strict=True):
            wanted = goal[passage.real]
            if self.basis is not None:
                wanted = wanted @ self.turn
            if writer.bias is not None:
                wanted = wanted - writer.bias
            fit.add(x[passage.real], wanted - z[passage.real])
        writer.weight.copy_(fit.solve(writer.weight, self.ridge))
        for at, (passage, x) in enumerate(zip(self.passages, outputs, strict=True)):
            with passage.forward():
                self.states[at] = self.states[at] + writer(x)


def _block(model: Transformer, layer: int) -> Block:
    block = model.model.layers[layer]
    assert isinstance(block, Block)
    return block
