"""Checkpoints of a run: whole model folders, plus what an exact continuation needs.

`checkpoints/step-000200/` is written under a temporary name and renamed; `last` and `best` are
links that are swapped atomically, so at every moment both lead to a whole folder. Folders that
neither link names are deleted. The optimiser's state, and maps of hidden states that are no part of
the model, stand beside the weights as safetensors; only `last` keeps them.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from xinslm.distill.auxiliary import Auxiliary
from xinslm.errors import XinslmError
from xinslm.files import new_folder, read_json, sync_folder, write_json
from xinslm.model.files import open_tensors, read_tensors, save_model
from xinslm.model.transformer import Transformer
from xinslm.train.optimizers import Optimizer

OPTIMIZER, AUXILIARY, STATE = (
    "optimizer.safetensors",
    "auxiliary.safetensors",
    "training_state.json",
)


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands; the order of rows follows from seed and step, so no generator's state is
    needed.
    """

    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Target tokens seen."""
    seconds: float = 0.0
    """Time spent in training."""
    best_validation: float | None = None
    """Lowest validation cross-entropy so far, nats a token."""
    grad_norm: float | None = None
    """Norm of the last step's gradient, which `step_in_backward` clips the next one by."""


def save_checkpoint(
    run: Path,
    model: Transformer,
    tokenizer: Any,
    optimizer: Optimizer,
    state: TrainingState,
    is_best: bool,
    auxiliary: Auxiliary | None = None,
) -> None:
    """Write the state as `last`, and as `best` if it is."""
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    with new_folder(folder, force=True, own=True) as partial:
        save_model(model, partial)
        tokenizer.save(partial)
        save_file(_optimizer_tensors(model, optimizer), partial / OPTIMIZER)
        if auxiliary is not None and auxiliary.matrices:
            save_file(auxiliary.state(), partial / AUXILIARY)
        write_json(partial / STATE, asdict(state))
    if is_best:  # first: a `last` that knows of a better loss must never stand beside an older best
        _point(folder.parent / "best", folder.name)
    _point(folder.parent / "last", folder.name)
    prune(folder.parent)


def save_best(run: Path, model: Transformer, tokenizer: Any, step: int) -> None:
    """Write the weights alone as `best`."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    with new_folder(folder, force=True, own=True) as partial:
        save_model(model, partial)
        tokenizer.save(partial)
    _point(folder.parent / "best", folder.name)
    prune(folder.parent)


def _point(link: Path, target: str) -> None:
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    os.symlink(target, fresh)
    os.replace(fresh, link)
    sync_folder(link.parent)


def prune(folder: Path) -> None:
    """Delete step folders that no link names, temporary ones, and the optimiser's state where it is
    not `last`'s.
    """
    named = {
        os.readlink(link): link.name
        for link in (folder / "best", folder / "last")
        if link.is_symlink()
    }
    for entry in folder.iterdir():
        if entry.is_symlink() or not entry.is_dir():
            continue
        if entry.name not in named:
            shutil.rmtree(entry, ignore_errors=True)
        elif named[entry.name] == "best":
            (entry / OPTIMIZER).unlink(missing_ok=True)
            (entry / AUXILIARY).unlink(missing_ok=True)


def _optimizer_tensors(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_checkpoint(folder: Path, model: Transformer, optimizer: Optimizer) -> TrainingState:
    """Put a checkpoint's weights and moments into `model` and `optimizer`, in place."""
    places: dict[str, Tensor] = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        places |= {f"{key}.{name}": value for key, value in optimizer.state_of(parameter).items()}
    for name, tensor in _stored(folder):
        place = places.pop(name, None)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            raise XinslmError(
                f"{folder} does not fit this run (at '{name}'); add --force to begin anew"
            )
        place.copy_(tensor)
    if places:
        raise XinslmError(
            f"{folder} does not fit this run (no '{min(places)}'); add --force to begin anew"
        )
    return TrainingState(**read_json(folder / STATE))


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights and the optimiser's tensors, one at a time."""
    yield from read_tensors(folder)
    with open_tensors(folder / OPTIMIZER) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)


def load_auxiliary(folder: Path, auxiliary: Auxiliary) -> None:
    """Put a checkpoint's maps of hidden states, and their moments, into `auxiliary`."""
    if auxiliary.matrices:
        if not (folder / AUXILIARY).is_file():
            raise XinslmError(f"{folder} has no {AUXILIARY}; add --force to begin anew")
        try:
            auxiliary.load_state(load_file(folder / AUXILIARY))
        except (KeyError, RuntimeError) as error:
            raise XinslmError(
                f"{folder / AUXILIARY} does not fit this run ({error}); add --force to begin anew"
            ) from None
