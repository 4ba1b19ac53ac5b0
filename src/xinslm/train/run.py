"""The stage `pretrain`, and what it shares with `distill`: one run folder from a dataset.

    xinslm pretrain --data-path text.txt --output-dir runs/model

The folder holds `config.yaml` (resolved), `run.json` (settings, inputs and size), `metrics.jsonl`
and `checkpoints/`. The same command on an unfinished folder continues it exactly; other settings
are refused by name.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xinslm.config import to_dict, to_yaml
from xinslm.data.dataset import Dataset
from xinslm.data.packing import PackedDataset
from xinslm.device import pick_device
from xinslm.errors import UsageError
from xinslm.files import MANIFEST, read_json, write_json, write_text
from xinslm.folders import Plan, claim, differing_keys, locked, refuse_output_in
from xinslm.heap import return_large_blocks
from xinslm.machine import environment
from xinslm.model.files import open_model, read_tensors, require_context, save_model
from xinslm.model.param_dtype import cast_matrices_to_bfloat16, round_in_forward
from xinslm.model.source import CONFIG as MODEL_CONFIG
from xinslm.model.source import TRAINED_FOR_Q4_0
from xinslm.model.transformer import Transformer, rotary_frequencies
from xinslm.precision import compute_dtype
from xinslm.progress import Listener, Progress, ignore
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train.checkpoint import TrainingState, last_checkpoint
from xinslm.train.config import PretrainConfig, TrainingConfig
from xinslm.train.inputs import find_dataset, shape
from xinslm.train.interfaces import Supervision
from xinslm.train.loop import Trainer, Validation, train
from xinslm.train.packed import packed_trainer, validation_data
from xinslm.train.recorder import RunRecorder, resume
from xinslm.train.row_sampler import Source

CONFIG, RUN = "config.yaml", "run.json"
TEACHER = "teacher"
"""Folder of a stand-in teacher in a run folder."""
CHANGEABLE = (
    "force",
    "output_dir",
    "logging_steps",
    "save_steps",
    "micro_batch_size",
    "gradient_checkpointing",
    "device",
    "compile",
)
"""Settings that a continued run may change: they do not change what is computed."""
PATHS = ("data_path", "tokenizer_path", "init_from")
"""Settings that name inputs."""
Supervise = Callable[[PretrainConfig, Dataset, torch.device, Listener], Supervision]


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
            f"model       {self.folder} ({self.parameters:,} parameters)",
            f"trained     {self.state.step:,} steps, {self.state.tokens:,} tokens in "
            f"{self.state.seconds:.0f} s "
            f"({self.state.tokens / max(self.state.seconds, 1e-9):,.0f} tokens/s)",
        ]
        if best is not None:
            lines.append(f"validation  {best:.4f} nats a token at best")
        return "\n".join(lines + [f"note        {warning}" for warning in self.warnings])


def run(config: PretrainConfig, on_progress: Listener = ignore) -> TrainResult:
    """Train a model on text alone.

    Raises UsageError if stages do not fit each other or the run folder holds something else,
    XinslmError at the first loss that is not finite, Interrupted (after a checkpoint) on Ctrl-C.
    """
    return run_training(config, "pretrain", lambda *_: Supervision(), PATHS, on_progress)


def run_training(
    config: PretrainConfig,
    command: str,
    supervise: Supervise,
    paths: tuple[str, ...],
    on_progress: Listener,
) -> TrainResult:
    """Train on a dataset under the supervision that `supervise` finds; errors as for `run`.

    `paths` are the settings that name inputs.
    """
    config.check()
    if _is_raw(config):
        refuse_output_in(config.output_dir, (config.data_path,))
    with locked(config.output_dir):
        with claim_run(config, command, paths):
            setup = _set_up(config, command, supervise, on_progress)
            state = resume(setup.trainer, read_tensors)
            require_unfinished(config.output_dir, state, setup.trainer.total_steps)
        warnings = setup.supervision.warnings
        if not setup.trainer.objective.has_held_out:
            warnings += ("there is no validation split: the last checkpoint counts as the best",)
        for warning in warnings:
            on_progress(Progress(command, note=warning))
        recorder = RunRecorder(
            setup.trainer,
            state,
            setup.write_model,
            on_progress,
            command,
            with_kd=setup.supervision.train is not None,
        )
        every = config.eval_steps or max(1, min(100, setup.trainer.total_steps // 10))
        state = train(setup.trainer, state, recorder, every)
    return TrainResult(
        config.output_dir, setup.parameters, state, recorder.last_validation, warnings
    )


@dataclass(frozen=True)
class _Setup:
    trainer: Trainer
    supervision: Supervision
    parameters: int
    write_model: Callable[[Path], None]


def _set_up(
    config: PretrainConfig, command: str, supervise: Supervise, on_progress: Listener
) -> _Setup:
    """Open the inputs, make the model and the trainer, and note what the run follows from."""
    dataset = find_dataset(config, on_progress)
    device = pick_device(config.device)
    tokenizer = load_tokenizer(dataset.folder / "tokenizer")
    supervision = supervise(config, dataset, device, on_progress)
    rows = _training_rows(config, dataset)
    total_steps = config.max_steps or max(
        1, round(config.num_epochs * len(rows) / config.batch_size)
    )
    if config.gradient_checkpointing and device.type == "cpu":
        return_large_blocks()
    model = _make_model(config, dataset, tokenizer)
    if config.param_dtype == "bfloat16":
        cast_matrices_to_bfloat16(model)
    if config.quantization_aware:
        rounded, layers = round_in_forward(model)
        if not rounded:
            raise UsageError(
                "no linear layer of the model has rows in blocks of 32, so none gets 4 bits: leave "
                "out --quantization-aware"
            )
        if rounded < layers:
            note = f"{layers - rounded} of {layers} linear layers have no rows in blocks of 32: "
            note += "they are not rounded in training"
            supervision = replace(supervision, warnings=(*supervision.warnings, note))
    model.compute_dtype = begun_dtype(config, device)
    model = model.to(device)
    make = supervision.make_auxiliary_loss
    held_out = validation_data(dataset, config.max_seq_length)
    trainer = packed_trainer(
        model,
        config,
        Source(rows, supervision.train, supervision.loss),
        total_steps,
        None if held_out is None else (held_out, supervision.validation),
        None if make is None else make(model.config, total_steps, device),
    )
    inputs = {"dataset": dataset.fingerprint, **dict(supervision.inputs)}
    if config.init_from is not None:
        inputs["init_from"] = open_model(config.init_from).fingerprint
    facts = {
        "total_steps": total_steps,
        "parameters": model.config.num_parameters,
        "inputs": inputs,
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
    }
    note_facts(config.output_dir, facts, device, supervision.warnings)
    return _Setup(
        trainer,
        supervision,
        model.config.num_parameters,
        partial(write_model, model, tokenizer, rounds=config.quantization_aware),
    )


def write_model(model: Transformer, tokenizer: Any, folder: Path, rounds: bool = False) -> None:
    """Write a model and its tokenizer into a folder; `rounds` says that it learned at 4 bits."""
    save_model(model, folder)
    if rounds:
        write_json(folder / MODEL_CONFIG, read_json(folder / MODEL_CONFIG) | TRAINED_FOR_Q4_0)
    tokenizer.save(folder)


def _is_raw(config: PretrainConfig) -> bool:
    """Whether the data is raw text, not a prepared dataset."""
    return not (config.data_path / MANIFEST).is_file()


def _training_rows(config: PretrainConfig, dataset: Dataset) -> PackedDataset:
    rows = PackedDataset(dataset.split("train"), config.max_seq_length)
    if len(rows) < config.batch_size:
        if _is_raw(config):  # made on the way from little text: cheap to make again
            _remove_made(config.output_dir)
        raise UsageError(
            f"batch_size is {config.batch_size} rows of {config.max_seq_length} tokens, but "
            f"{config.data_path} has only {len(rows)} to train on: give more text, or a smaller "
            "--batch-size or --max-seq-length"
        )
    return rows


@contextmanager
def claim_run(config: TrainingConfig, command: str, paths: tuple[str, ...]) -> Iterator[None]:
    """Begin or continue the run folder of a training command and write `config.yaml`.

    `paths` are the settings that name inputs: they are compared as absolute paths, and --force does
    not delete what they name. Settings may change until training has begun.
    """
    folder = config.output_dir
    settings = {k: v for k, v in to_dict(config).items() if k not in CHANGEABLE}
    for name in set(paths) & set(settings):
        value = settings[name]
        settings[name] = (
            [_resolved(x) for x in value] if isinstance(value, list) else _resolved(value)
        )
    named = (getattr(config, name) for name in paths)
    reads = tuple(x for value in named for x in (value if isinstance(value, tuple) else (value,)))
    content = {"command": command, "settings": settings}
    plan = Plan(RUN, content, "run", reads=reads, also=(CONFIG,))

    def may_change() -> bool:
        begun = last_checkpoint(folder) is not None
        if not begun:
            _remove_made(folder)
        return not begun

    with claim(folder, plan, config.force, may_change) as continued:
        write_text(folder / CONFIG, to_yaml(replace(config, force=False), command))
        try:
            yield
        except Exception:
            if not continued and not (folder / "data" / MANIFEST).is_file():
                _remove_made(folder)
            raise


def _resolved(name: str | None) -> str | None:
    """A name as an absolute path, if there is such a file or folder."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def begun_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """Type of the run's products: of a run that has begun, the one it began with."""
    name: str = config.compute_dtype
    if name == "auto" and last_checkpoint(config.output_dir) is not None:
        name = read_json(config.output_dir / RUN).get("compute_dtype", name)
    return compute_dtype(name, device)


def _remove_made(folder: Path) -> None:
    """Remove what was made from raw text on the way."""
    for name in ("data", "tokenizer", TEACHER):
        shutil.rmtree(folder / name, ignore_errors=True)


def note_facts(
    folder: Path, facts: dict[str, Any], device: torch.device, warnings: tuple[str, ...] = ()
) -> None:
    """Add what the run follows from besides its settings to `run.json`, and for the report date,
    machine and warnings of its beginning.

    Raises UsageError if training has begun with other inputs.
    """
    stored = read_json(folder / RUN)
    about = {**environment(device), "warnings": list(warnings)}
    if last_checkpoint(folder) is not None:
        changed = differing_keys(facts, {key: stored.get(key) for key in facts})
        if changed:
            raise UsageError(
                f"{folder} cannot be continued: {', '.join(changed)} changed since it began. "
                "Choose another --output-dir, or add --force to replace it"
            )
        about |= {key: stored[key] for key in about if key in stored}
    write_json(folder / RUN, {**stored, **facts, **about})


def add_warning(result: TrainResult, warning: str) -> TrainResult:
    """Add a warning to a finished run's result and to its `run.json`, for the report."""
    warnings = (*result.warnings, warning)
    stored = read_json(result.folder / RUN)
    write_json(result.folder / RUN, {**stored, "warnings": list(warnings)})
    return replace(result, warnings=warnings)


def require_unfinished(folder: Path, state: TrainingState, total_steps: int) -> None:
    """Raise UsageError if the run is finished."""
    if state.step >= total_steps:
        raise UsageError(
            f"{folder} already holds this run, finished. Choose another --output-dir, or add "
            "--force to replace it"
        )


def _make_model(config: PretrainConfig, dataset: Dataset, tokenizer: Any) -> Transformer:
    """The model at step 0: drawn from the seed, or read from `init_from`."""
    if config.init_from is None:
        with torch.device("meta"):
            model = Transformer(shape(config, tokenizer), config.gradient_checkpointing)
        model.to_empty(device="cpu")
        model.frequencies = rotary_frequencies(model.config)  # not a weight, so emptied above
        model.initialise(torch.Generator().manual_seed(config.seed))
        return model
    source = open_model(config.init_from)
    fixed = (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "sliding_window",
    )
    if given := [name for name in fixed if getattr(config, name) is not None]:
        raise UsageError(f"init_from fixes the model's shape: drop {', '.join(given)}")
    if load_tokenizer(config.init_from).fingerprint() != dataset.tokenizer_fingerprint:
        raise UsageError(
            f"model {source.path} and dataset {dataset.folder} have different tokenizers; prepare "
            "the data with the model's"
        )
    require_context(
        config.max_seq_length, source.config.max_position_embeddings, f"model {source.path}"
    )
    return source.transformer(gradient_checkpointing=config.gradient_checkpointing)
