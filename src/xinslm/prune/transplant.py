"""A narrower residual stream, and weights fitted to what the cuts have left.

RMSNorm without its gain commutes with rotations (SliceGPT, arXiv:2401.15024, section 3), so the
stream may be turned to its principal directions, of which the first hold most of it, and the gains
folded into the matrices that follow. One rotation serves all layers: a LLaMA's skip connections
have no matrix in which two could meet.

Each matrix is then fitted by least squares to the teacher's activations, in the order in which
states pass: those that read a norm, to give from the student's state what they gave from the
teacher's; those that write to the stream, to bring the student's state to where the teacher's is,
dropped layers behind them included. The fit is pulled towards the plainly cut weights, so little
text changes little.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xinslm.model.config import ModelConfig
from xinslm.model.transformer import Block, RMSNorm, Transformer
from xinslm.prune.cuts import EMBEDDING, HEAD, NORM, Weights, assemble
from xinslm.prune.measure import Passage, Statistics, advance, mixed, neurons, products, unit

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def principal_directions(stream: Tensor, width: int) -> Tensor:
    """The `width` directions that hold most of products (d, d): orthonormal columns (d, width),
    float64.
    """
    return torch.linalg.eigh(stream).eigenvectors.flip(1)[:, :width]


def norm_factor(products_of_stream: Tensor, basis: Tensor) -> float:
    """What a norm over the narrow state must be multiplied by to give the wide norm's image.

    The divisor of RMSNorm is the mean square over fewer channels, which hold most of the sum of
    squares.
    """
    wide = products_of_stream.trace() / len(products_of_stream)
    narrow = (basis * (products_of_stream @ basis)).sum() / basis.shape[1]
    return math.sqrt(float(narrow / wide))


def narrow(
    thin: Transformer, student: ModelConfig, basis: Tensor, statistics: Statistics
) -> Transformer:
    """`thin` in the coordinates of `basis` (d, width), gains folded into the matrices behind
    them.
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
    gain = source[NORM]
    factor = norm_factor(statistics.final, basis)
    if student.tie_word_embeddings:
        # The gain is not diagonal in the new coordinates; its diagonal stays, and the embedding
        # gives way a little.
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
    """One matrix for reading and writing, by least squares: near the turned embedding, and near the
    teacher's logits.

    Per unit of state, an error in what is read weighs half of one in what is written.
    """
    rows = embedding.cpu().double()
    final = statistics.final / statistics.ids.sum()
    seen = (basis.T @ final @ basis) * diagonal[:, None] * diagonal
    logits = (rows * gain.cpu().double()) @ final @ basis * diagonal  # (vocabulary, width)
    weight = 0.5 * seen.diagonal().mean()
    wanted = weight * rows @ basis + logits
    return torch.linalg.solve(seen + weight * torch.eye(len(seen), dtype=seen.dtype), wanted.T).T


class Fit:
    """Ridge regression by sums of products: a matrix W with W x near t, pulled towards a prior."""

    def __init__(self) -> None:
        self._inputs: Tensor | float = 0.0
        self._targets: Tensor | float = 0.0

    def add(self, x: Tensor, t: Tensor) -> None:
        """Take inputs (N, p) and targets (N, q)."""
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


def compensate(
    teacher: Transformer,
    thin: Transformer,
    plain: Transformer,
    kept: Sequence[int],
    basis: Tensor | None,
    passages: Sequence[Passage],
    ridge: float,
    on_layer: Callable[[int], None],
) -> Transformer:
    """Fit `plain` to the teacher's activations, layer by layer.

    `thin` is the model of the layers `kept` with their heads and neurons at the teacher's width,
    `plain` the same after `narrow` (with no `basis`: the same model).
    """
    student = assemble(
        plain.config, {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    )
    dimensions = thin.config.hidden_size
    turn = torch.eye(dimensions) if basis is None else basis
    turn = turn.to(plain.model.embed_tokens.weight)
    wide = [teacher.model.embed_tokens(passage.ids) for passage in passages]
    states = [student.model.embed_tokens(passage.ids) for passage in passages]
    ends = [*kept[1:], teacher.config.num_hidden_layers]
    for at in range(kept[0]):
        wide = _through(teacher, at, passages, wide)
    for index, (layer, end) in enumerate(zip(kept, ends, strict=True)):
        block, origin, source = (
            student.model.layers[index],
            thin.model.layers[index],
            teacher.model.layers[layer],
        )
        assert isinstance(block, Block) and isinstance(origin, Block) and isinstance(source, Block)
        _fit_readers(
            block,
            origin,
            "input_layernorm",
            source.input_layernorm,
            basis,
            passages,
            wide,
            states,
            ridge,
        )
        middles, goals = [], []
        for passage, x in zip(passages, wide, strict=True):
            middle, goal = advance(teacher, source, passage, x)
            middles.append(middle)
            goals.append(goal)
        for skipped in range(layer + 1, end):
            goals = _through(teacher, skipped, passages, goals)
        outputs = [
            mixed(student, block, block.input_layernorm(z), passage)
            for passage, z in zip(passages, states, strict=True)
        ]
        states = _fit_writer(
            block.self_attn.o_proj, outputs, turn, passages, middles, states, ridge
        )
        _fit_readers(
            block,
            origin,
            "post_attention_layernorm",
            source.post_attention_layernorm,
            basis,
            passages,
            middles,
            states,
            ridge,
        )
        outputs = [neurons(block, block.post_attention_layernorm(z)) for z in states]
        states = _fit_writer(block.mlp.down_proj, outputs, turn, passages, goals, states, ridge)
        wide = goals
        on_layer(index + 1)
    if not student.config.tie_word_embeddings:
        matrix = _reading(
            teacher.model.norm, student.model.norm, basis, passages, wide, states, ridge
        )
        student.lm_head.weight.copy_(thin.head_weight @ matrix)
    return student


def _through(
    teacher: Transformer, layer: int, passages: Sequence[Passage], states: list[Tensor]
) -> list[Tensor]:
    block = teacher.model.layers[layer]
    assert isinstance(block, Block)
    return [
        advance(teacher, block, passage, x)[1] for passage, x in zip(passages, states, strict=True)
    ]


def _reading(
    source: RMSNorm,
    norm: RMSNorm,
    basis: Tensor | None,
    passages: Sequence[Passage],
    wide: list[Tensor],
    states: list[Tensor],
    ridge: float,
) -> Tensor:
    """Fit the matrix (d, width) that gives the teacher's normalised state from the student's."""
    fit = Fit()
    for passage, x, z in zip(passages, wide, states, strict=True):
        fit.add(norm(z[passage.real]), source(x[passage.real]))
    if basis is None:
        prior = torch.eye(len(source.weight)).to(source.weight)
    else:
        turn = basis.to(source.weight)
        # The narrow norm's gain is one number, which `factor` takes up; the wide gain stands in the
        # prior.
        shares = [unit(x[p.real], source.eps) @ turn for p, x in zip(passages, wide, strict=True)]
        own = [norm(z[p.real]) for p, z in zip(passages, states, strict=True)]
        factor = sum(float((a * b).sum()) for a, b in zip(shares, own, strict=True)) / sum(
            float(b.pow(2).sum()) for b in own
        )
        prior = source.weight[:, None] * turn * factor
    return fit.solve(prior, ridge)


def _fit_readers(
    block: Block,
    origin: Block,
    name: str,
    source: RMSNorm,
    basis: Tensor | None,
    passages: Sequence[Passage],
    wide: list[Tensor],
    states: list[Tensor],
    ridge: float,
) -> None:
    norm = block.get_submodule(name)
    assert isinstance(norm, RMSNorm)
    matrix = _reading(source, norm, basis, passages, wide, states, ridge)
    for reader in READERS[name]:
        block.get_parameter(f"{reader}.weight").copy_(
            origin.get_parameter(f"{reader}.weight") @ matrix
        )


def _fit_writer(
    writer: torch.nn.Linear,
    outputs: list[Tensor],
    turn: Tensor,
    passages: Sequence[Passage],
    goals: list[Tensor],
    states: list[Tensor],
    ridge: float,
) -> list[Tensor]:
    """Fit the matrix that adds `outputs` to the states so that they come to the goals; return the
    states after it.
    """
    fit = Fit()
    for passage, x, goal, z in zip(passages, outputs, goals, states, strict=True):
        fit.add(x[passage.real], goal[passage.real] @ turn - z[passage.real])
    writer.weight.copy_(fit.solve(writer.weight, ridge))
    return [z + writer(x) for z, x in zip(states, outputs, strict=True)]
