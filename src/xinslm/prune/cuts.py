"""Pruning of layers, neurons and vocabulary rows. Weights that are not cut are shared with the
teacher.

Neurons are ranked by the mean square of their contribution to the residual stream.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xinslm.errors import UsageError
from xinslm.model.config import ModelConfig
from xinslm.model.transformer import Transformer

Weights = dict[str, Tensor]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def assemble(config: ModelConfig, weights: Weights) -> Transformer:
    """Build a model on weights without copying them."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    return model.to(weights[EMBEDDING].device).eval().requires_grad_(False)


def keep_layers(config: ModelConfig, weights: Weights, kept: Sequence[int]) -> Transformer:
    """Build the model that has only the layers `kept`, in that order."""
    cut = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.")}
    for index, layer in enumerate(kept):
        prefix = f"model.layers.{layer}."
        for name, tensor in weights.items():
            if name.startswith(prefix):
                cut[f"model.layers.{index}.{name.removeprefix(prefix)}"] = tensor
    return assemble(dataclasses.replace(config, num_hidden_layers=len(kept)), cut)


def choose_neurons(squares: Tensor, down: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` neurons that add most to the residual stream.

    squares: activation squares (f,). down: output matrix (d, f).
    """
    added = squares * down.cpu().double().pow(2).sum(0)
    return added.argsort(descending=True, stable=True)[:count].sort().values


def keep_neurons(layer: Weights, kept: Tensor) -> Weights:
    """Return one layer's feed-forward with only the neurons `kept`."""
    kept = kept.to(layer["mlp.down_proj.weight"].device)
    return {
        "mlp.gate_proj.weight": layer["mlp.gate_proj.weight"][kept],
        "mlp.up_proj.weight": layer["mlp.up_proj.weight"][kept],
        "mlp.down_proj.weight": layer["mlp.down_proj.weight"][:, kept],
    }


def vocabulary_rows(student: Any, teacher: Any, where: str) -> list[int]:
    """Map each token id of the student to the teacher's: the token with the same bytes, or the
    special token with the same content or role.

    Raises UsageError if the student's vocabulary is not nested in the teacher's.
    """
    from xinslm.alignment.nested import is_nested

    if student.fingerprint() == teacher.fingerprint():
        return list(range(student.vocab_size))
    if not is_nested(student, teacher):
        raise UsageError(
            f"the tokenizer of {where} is neither the teacher's nor nested in it, so the "
            "teacher's embedding has no rows for its tokens. Make one with `xinslm tokenizer "
            "train --prefix-of TEACHER`, and prepare the data with it"
        )
    theirs = {teacher.token_bytes(token): token for token in reversed(range(teacher.vocab_size))}
    theirs.update({content.encode(): token for content, token in teacher.special_tokens.items()})
    roles = {
        getattr(student, role): getattr(teacher, role)
        for role in ("bos_id", "eos_id", "pad_id")
        if getattr(student, role) is not None and getattr(teacher, role) is not None
    }
    special = {token: content for content, token in student.special_tokens.items()}
    rows = []
    for token in range(student.vocab_size):
        if token in special:
            row = teacher.special_tokens.get(special[token], roles.get(token))
        else:
            row = theirs.get(student.token_bytes(token))
        if row is None:
            name = special.get(token, repr(student.token_bytes(token)))
            raise UsageError(
                f"the tokenizer of {where} has the token {name}, which the teacher's does not "
                "have; make it with `xinslm tokenizer train --prefix-of TEACHER` and the teacher's "
                "special tokens"
            )
        rows.append(row)
    return rows


def keep_vocabulary(teacher: Transformer, rows: Sequence[int], ids: dict[str, Any]) -> Transformer:
    """Cut the teacher's vocabulary to the tokens `rows`, renumbered; `ids` are its special
    tokens.
    """
    config = dataclasses.replace(teacher.config, vocab_size=len(rows), **ids)
    weights = dict(teacher.state_dict())
    if list(rows) != list(range(teacher.config.vocab_size)):
        for name in (EMBEDDING, HEAD):
            if name in weights:
                weights[name] = weights[name][torch.tensor(rows, device=weights[name].device)]
    return assemble(config, weights)
