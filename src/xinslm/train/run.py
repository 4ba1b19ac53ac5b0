"""The stages `pretrain` and `distill`: one run folder from a dataset, with or without a teacher.

    xinslm distill --data-path data --cache cache --output-dir runs/student

The folder holds `config.yaml` (resolved), `run.json` (inputs and size), `metrics.jsonl` and
`checkpoints/`. The same command on an unfinished folder continues it exactly; another configuration
is refused by the names of its keys.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from xinslm.config import HEADER, to_dict, to_yaml
from xinslm.data.dataset import Dataset
from xinslm.data.packing import PackedRows
from xinslm.device import pick_device, return_freed_memory
from xinslm.distill.auxiliary import make_auxiliary
from xinslm.distill.config import DistillConfig, PretrainConfig
from xinslm.distill.supervision import find_teaching
from xinslm.errors import UsageError, XinslmError
from xinslm.files import (
    read_json,
    refuse_existing,
    refuse_inside,
    remove_partials,
    write_json,
    write_text,
)
from xinslm.model.files import (
    load_config,
    load_model,
    model_fingerprint,
    rebuild_buffers,
    require_context,
    resolve_model,
)
from xinslm.model.param_dtype import narrow_matrices
from xinslm.model.transformer import Transformer
from xinslm.progress import Listener, Progress, ignore
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train.checkpoint import (
    TrainingState,
    load_auxiliary,
    load_checkpoint,
    prune,
    save_best,
    save_checkpoint,
)
from xinslm.train.inputs import differing_keys, find_dataset, shape
from xinslm.train.loop import Trainer, Validation, train
from xinslm.train.run_log import METRICS, RunLog, cut_metrics

CONFIG, RUN = "config.yaml", "run.json"


@dataclass(frozen=True)
class TrainResult:
    """What a training run made."""

    folder: Path
    parameters: int
    state: TrainingState
    validation: Validation | None
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """Lines for the terminal."""
        best = self.state.best_validation
        lines = [
            f"model       {self.folder / 'checkpoints' / 'best'} ({self.parameters:,} parameters)",
            f"trained     {self.state.step:,} steps, {self.state.tokens:,} tokens in "
            f"{self.state.seconds:.0f} s "
            f"({self.state.tokens / max(self.state.seconds, 1e-9):,.0f} tokens/s)",
        ]
        if best is not None:
            lines.append(f"validation  {best:.4f} nats a token at best")
        return "\n".join(lines + [f"note        {warning}" for warning in self.warnings])


def run(config: PretrainConfig, on_progress: Listener = ignore) -> TrainResult:
    """Train a model; with a `DistillConfig`, from its cache or live teacher.

    Raises UsageError where stages do not fit each other or the run folder holds something else,
    XinslmError at the first loss that is not finite, `loop.Interrupted` (after a checkpoint) on
    Ctrl-C.
    """
    config.check()
    command = "distill" if isinstance(config, DistillConfig) else "pretrain"
    with _run_folder(config, command):
        dataset = find_dataset(config, on_progress)
        device = pick_device(config.device)
        tokenizer = load_tokenizer(dataset.folder / "tokenizer")
        teaching = find_teaching(config, dataset, device, on_progress)
        rows = PackedRows(dataset.split("train"), config.max_seq_length)
        if len(rows) < config.batch_size:
            raise UsageError(
                f"batch_size is {config.batch_size} rows of {config.max_seq_length} tokens, but "
                f"{dataset.folder} has "
                f"only {len(rows)} such rows to train on: give more text, or a smaller "
                "--batch-size or --max-seq-length"
            )
        total_steps = config.max_steps or max(
            1, round(config.num_epochs * len(rows) / config.batch_size)
        )
        if config.checkpointing and device.type == "cpu":
            return_freed_memory()
        model = _start(config, dataset, tokenizer)
        if config.weights == "bfloat16":
            narrow_matrices(model)
            model.compute_dtype = torch.float32
        model = model.to(device)
        auxiliary = make_auxiliary(config, teaching.hidden, model.config, total_steps, device)
        trainer = Trainer(
            model, config, teaching.loss, rows, total_steps, teaching.train, device, auxiliary
        )
        inputs = {"dataset": dataset.fingerprint, **dict(teaching.inputs)}
        if config.init_from is not None:
            inputs["init_from"] = model_fingerprint(resolve_model(config.init_from))
        facts = {
            "command": command,
            "total_steps": total_steps,
            "parameters": model.config.num_parameters,
            "inputs": inputs,
        }
        state = _resume(config.output_dir, facts, trainer)
    held_out, warnings = _held_out(dataset, config.max_seq_length), teaching.warnings
    if held_out is None:
        warnings += ("there is no validation split: the last checkpoint counts as the best",)

    log = RunLog(
        config, total_steps, state, on_progress, command, with_kd=teaching.train is not None
    )
    for warning in warnings:
        on_progress(Progress(command, note=warning))
    state = train(
        trainer,
        state,
        held_out,
        teaching.validation,
        log.step,
        log.validation,
        lambda at, best: save_checkpoint(
            config.output_dir, model, tokenizer, trainer.optimizer, at, best, auxiliary
        ),
        lambda at: save_best(config.output_dir, model, tokenizer, at.step),
    )
    return TrainResult(
        config.output_dir, model.config.num_parameters, state, log.last_validation, warnings
    )


def _held_out(dataset: Dataset, max_seq_length: int) -> PackedRows | None:
    if "validation" not in dataset.manifest["splits"]:
        return None
    rows = PackedRows(dataset.split("validation"), max_seq_length)
    return rows if len(rows) else None


INDIFFERENT = (
    "force",
    "output_dir",
    "log_every",
    "save_every",
    "micro_batch_size",
    "checkpointing",
    "device",
    "compile",
)
"""Settings that a continued run may change: they do not change what is computed."""
PATHS = ("data_path", "tokenizer_path", "init_from", "cache", "sketches")


def _settings(stored: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in stored.items() if k not in INDIFFERENT}
    return settings | {k: str(Path(settings[k]).resolve()) for k in PATHS if settings.get(k)}


@contextmanager
def _run_folder(config: PretrainConfig, command: str) -> Iterator[None]:
    """Hold the run folder for the time of the setup: what it replaces comes back if the setup
    fails.

    A fresh folder, one whose training never began and the same unfinished run pass; --force
    replaces a run; anything else is refused. Nothing that is not a run's is ever deleted.
    """
    folder = config.output_dir.resolve()
    remove_partials(folder)
    aside = None
    if _is_run(folder) and config.force:
        refuse_inside(folder, (getattr(config, name, None) for name in (*PATHS, "teacher")))
        aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        os.rename(folder, aside)
    elif not _is_run(folder):
        refuse_existing(folder, force=False)
    elif differing := differing_keys(_settings(to_dict(config)), _settings(_stored(folder))):
        if (folder / RUN).is_file():
            raise UsageError(
                f"{config.output_dir} holds a run with another {', '.join(differing)}. Choose "
                "another --output-dir, "
                f"give its settings again to continue it (--config {config.output_dir / CONFIG}), "
                "or add --force to "
                f"replace it"
            )
        # made on the way for settings that have changed; nothing was trained
        for name in ("data", "tokenizer"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, to_yaml(replace(config, force=False), command))
    try:
        yield
    except BaseException:
        if aside is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
        elif [p.name for p in folder.iterdir()] == [CONFIG]:
            shutil.rmtree(folder)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _is_run(folder: Path) -> bool:
    """Whether a folder's config.yaml is one that a run wrote."""
    path = folder / CONFIG
    return path.is_file() and path.read_bytes().startswith(HEADER.encode())


def _stored(folder: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict):
        raise XinslmError(f"{folder / CONFIG} is damaged; add --force to begin anew")
    return stored


def _start(config: PretrainConfig, dataset: Dataset, tokenizer: Any) -> Transformer:
    """The model at step 0: drawn from the seed, or read from `init_from`."""
    if config.init_from is None:
        with torch.device("meta"):
            model = Transformer(shape(config, tokenizer), config.checkpointing)
        model.to_empty(device="cpu")
        rebuild_buffers(model)
        model.initialise(torch.Generator().manual_seed(config.seed))
        return model
    folder = resolve_model(config.init_from)
    changed = (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "sliding_window",
    )
    if given := [name for name in changed if getattr(config, name) is not None]:
        raise UsageError(f"init_from fixes the model's shape: drop {', '.join(given)}")
    if load_tokenizer(folder).fingerprint() != dataset.tokenizer_fingerprint:
        raise UsageError(
            f"model {folder} and dataset {dataset.folder} have different tokenizers; prepare the "
            "data with the model's"
        )
    require_context(
        config.max_seq_length, load_config(folder).max_position_embeddings, f"model {folder}"
    )
    return load_model(folder, checkpointing=config.checkpointing)


def _resume(folder: Path, facts: dict[str, Any], trainer: Trainer) -> TrainingState:
    """Continue from `last` if the folder has it; otherwise write what a run folder begins with."""
    last = folder / "checkpoints" / "last"
    if (folder / RUN).is_file() and last.is_dir():
        changed = differing_keys(facts, read_json(folder / RUN))
        if changed:
            raise UsageError(
                f"{folder} cannot be continued: {', '.join(changed)} changed since it began. "
                "Choose another "
                f"--output-dir, or add --force to begin anew"
            )
        state = load_checkpoint(last, trainer.model, trainer.optimizer)
        if trainer.backward is not None:
            trainer.backward.previous = state.grad_norm or 0.0
        if trainer.auxiliary is not None:
            load_auxiliary(last, trainer.auxiliary)
        if state.step >= trainer.total_steps:
            raise UsageError(
                f"{folder} already holds this run, finished. Choose another "
                "--output-dir, or add --force"
            )
        prune(last.parent)
        cut_metrics(folder / METRICS, state.step)
        return state
    write_json(folder / RUN, facts)
    (folder / METRICS).write_bytes(b"")
    return TrainingState()
