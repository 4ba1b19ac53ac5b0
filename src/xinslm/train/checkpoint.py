"""Checkpoints of a run: model folders, plus what an exact continuation needs.

`checkpoints/step-000200/` is written under a temporary name and renamed. `last` and `best` are
links that are swapped atomically, so both always lead to a complete folder; folders that neither
names are deleted. The best model is also at the top of the run folder (`best.py`). Only `last`
keeps the optimizer's state and the projections of hidden states, as safetensors; their hashes are
in `training_state.json` and are checked when they are read.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xinslm.errors import XinslmError
from xinslm.files import damaged_files, read_json, sha256_file, sync_folder, write_json
from xinslm.folders import new_folder
from xinslm.model.source import open_tensors
from xinslm.train.best import link_or_copy, publish
from xinslm.train.interfaces import AuxiliaryLoss
from xinslm.train.optimizers import Optimizer

CHECKPOINTS = "checkpoints"
OPTIMIZER, AUXILIARY, STATE = (
    "optimizer.safetensors",
    "auxiliary.safetensors",
    "training_state.json",
)


@dataclass(frozen=True)
class TrainingState:
    """The state of a run after a step."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Target tokens seen."""
    seconds: float = 0.0
    """Time spent in training."""
    best_validation: float | None = None
    """Lowest validation cross-entropy so far, nats per token."""
    grad_norm: float | None = None
    """Norm of the last step's gradient, which `optimizer_in_backward` clips the next one by."""


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    folder = run / CHECKPOINTS / "last"
    return folder if folder.is_dir() else None


def read_state(folder: Path) -> TrainingState:
    """The training state of a checkpoint."""
    stored = read_json(folder / STATE)
    stored.pop("files", None)
    return TrainingState(**stored)


def save_checkpoint(
    run: Path,
    write_model: Callable[[Path], None],
    optimizer: Optimizer,
    state: TrainingState,
    is_best: bool,
    auxiliary: AuxiliaryLoss | None = None,
) -> None:
    """Write the state as `last`, and as `best` if it is; `write_model` fills a folder with the
    model.
    """
    folder = run / CHECKPOINTS / f"step-{state.step:06d}"
    with new_folder(folder, force=True, own=True) as partial:
        write_model(partial)
        save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER)
        if auxiliary is not None and auxiliary.matrices:
            save_file(auxiliary.state(), partial / AUXILIARY)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(partial.glob("*.safetensors"))
        }
        write_json(partial / STATE, {**asdict(state), "files": files})
    if is_best:  # first: `last` must never know of a better loss than an older best
        _set_best(folder)
    _point(folder.parent / "last", folder.name)
    delete_unlinked(folder.parent)


def save_best(run: Path, write_model: Callable[[Path], None], step: int) -> None:
    """Write the weights alone as `best`."""
    folder = run / CHECKPOINTS / f"step-{step:06d}"
    with new_folder(folder, force=True, own=True) as partial:
        write_model(partial)
    _set_best(folder)
    delete_unlinked(folder.parent)


def _set_best(folder: Path) -> None:
    """Make a step folder `best`, and its model the one at the top of the run folder."""
    _point(folder.parent / "best", folder.name)
    publish(folder, folder.parent.parent, skip=(OPTIMIZER, AUXILIARY, STATE))


def _point(link: Path, target: str) -> None:
    """Let `link` lead to a step folder.

    It becomes a folder of the same files if the file system has no symbolic links, or if it is one
    already, as in a copy that resolved the links.
    """
    if link.is_symlink() or not link.exists():
        fresh = link.with_name(f".{link.name}.link")
        fresh.unlink(missing_ok=True)
        with suppress(OSError):
            os.symlink(target, fresh)
            os.replace(fresh, link)
            sync_folder(link.parent)
            return
    with new_folder(link, force=True, own=True) as partial:
        for file in (link.parent / target).iterdir():
            link_or_copy(file, partial / file.name)


def delete_unlinked(folder: Path) -> None:
    """Delete step folders that no link names, temporary ones, and the optimizer's state of `best`
    if it is not `last`.
    """
    named = {
        os.readlink(link) if link.is_symlink() else link.name: link.name
        for link in (folder / "best", folder / "last")
        if link.is_symlink() or link.is_dir()
    }
    for entry in folder.iterdir():
        if entry.is_symlink() or not entry.is_dir():
            continue
        if entry.name not in named:
            shutil.rmtree(entry, ignore_errors=True)
        elif named[entry.name] == "best":
            (entry / OPTIMIZER).unlink(missing_ok=True)
            (entry / AUXILIARY).unlink(missing_ok=True)


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value.detach().cpu().contiguous()
        for parameter, name in optimizer.names.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_checkpoint(
    folder: Path, weights: Iterable[tuple[str, Tensor]], model: nn.Module, optimizer: Optimizer
) -> TrainingState:
    """Copy a checkpoint's weights (name, tensor) and optimizer state into `model` and `optimizer`.

    Raises XinslmError if a file is damaged or does not fit the run.
    """
    stored = read_json(folder / STATE)
    if damaged := damaged_files(folder, {"files": stored.get("files", {})}):
        raise XinslmError(
            f"{folder / damaged[0]} is missing or damaged: it does not have the recorded hash. "
            "Copy the run again, or add --force to restart"
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    places: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if n in trained}
    _fill(folder, weights, dict(model.state_dict()), places)
    places = {
        f"{key}.{name}": value
        for parameter, name in optimizer.names.items()
        for key, value in optimizer.state_of(parameter).items()
    }
    with open_tensors(folder / OPTIMIZER) as tensors:
        names = list(tensors.keys())
        _fill(folder, ((n, tensors.get_tensor(n)) for n in names), places, dict(places))
    return read_state(folder)


def _fill(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    places: dict[str, Tensor],
    wanted: dict[str, Tensor],
) -> None:
    """Copy tensors into `places` by name; all of `wanted` must come."""
    for name, tensor in tensors:
        place = places.get(name)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            raise XinslmError(
                f"{folder} does not fit this run (at '{name}'); add --force to restart"
            )
        place.copy_(tensor)
        wanted.pop(name, None)
    if wanted:
        raise XinslmError(
            f"{folder} does not fit this run (no '{min(wanted)}'); add --force to restart"
        )


def load_auxiliary_loss(folder: Path, auxiliary: AuxiliaryLoss) -> None:
    """Restore the projections of hidden states and their optimizer."""
    if auxiliary.matrices:
        if not (folder / AUXILIARY).is_file():
            raise XinslmError(f"{folder} has no {AUXILIARY}; add --force to restart")
        try:
            auxiliary.load_state(load_file(folder / AUXILIARY))
        except (KeyError, RuntimeError) as error:
            raise XinslmError(
                f"{folder / AUXILIARY} does not fit this run ({error}); add --force to restart"
            ) from None
