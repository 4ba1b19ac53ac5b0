"""The stages `pretrain` and `distill`: one run folder from a dataset, with or without a teacher.

    xinslm distill --data-path data --cache cache --output-dir runs/student

The folder holds `config.yaml` (resolved), `run.json` (inputs and size), `metrics.jsonl` and `checkpoints/`. The same
command on an unfinished folder continues it exactly; another configuration is refused by the names of its keys.
"""

import json
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
from xinslm.distill.auxiliary import find_sketches, hidden_shares, make_auxiliary
from xinslm.distill.cache import Cache
from xinslm.distill.checkpoint import TrainingState, load_auxiliary, load_checkpoint, prune, save_best, save_checkpoint
from xinslm.distill.chunks import CachedSpans
from xinslm.distill.config import DistillConfig, PretrainConfig
from xinslm.distill.inputs import differing_keys, find_dataset, shape
from xinslm.distill.loop import Step, Trainer, Validation, train
from xinslm.distill.loss_config import LossConfig
from xinslm.distill.sketches import SKETCH, HiddenSource
from xinslm.distill.targets import CachedTargets, LiveTargets, TargetSource
from xinslm.errors import UsageError, XinslmError
from xinslm.files import (
    manifest_fingerprint,
    read_json,
    refuse_existing,
    refuse_inside,
    remove_partials,
    write_json,
    write_text,
)
from xinslm.model.files import load_config, load_model, model_fingerprint, rebuild_buffers, resolve_model
from xinslm.model.transformer import Transformer
from xinslm.model.wide import narrow_matrices
from xinslm.progress import Listener, Progress, ignore
from xinslm.teachers.encoder import find_encoder
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.tokenizer.load import load_tokenizer

CONFIG, METRICS, RUN = "config.yaml", "metrics.jsonl", "run.json"


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
            f"trained     {self.state.step:,} steps, {self.state.tokens:,} tokens in {self.state.seconds:.0f} s "
            f"({self.state.tokens / max(self.state.seconds, 1e-9):,.0f} tokens/s)",
        ]
        if best is not None:
            lines.append(f"validation  {best:.4f} nats a token at best")
        return "\n".join(lines + [f"note        {warning}" for warning in self.warnings])


@dataclass(frozen=True)
class _Teaching:
    """Loss and sources of teacher distributions; none in pre-training."""

    loss: LossConfig
    train: TargetSource | None = None
    validation: TargetSource | None = None
    hidden: HiddenSource | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()


def run(config: PretrainConfig, on_progress: Listener = ignore) -> TrainResult:
    """Train a model; with a `DistillConfig`, from its cache or live teacher.

    Raises UsageError where stages do not fit each other or the run folder holds something else, XinslmError at the
    first loss that is not finite, `loop.Interrupted` (after a checkpoint) on Ctrl-C.
    """
    config.check()
    command = "distill" if isinstance(config, DistillConfig) else "pretrain"
    with _run_folder(config, command):
        dataset = find_dataset(config, on_progress)
        device = pick_device(config.device)
        tokenizer = load_tokenizer(dataset.folder / "tokenizer")
        teaching = _teaching(config, dataset, device, on_progress)
        rows = PackedRows(dataset.split("train"), config.max_seq_length)
        if len(rows) < config.batch_size:
            raise UsageError(
                f"batch_size is {config.batch_size} rows of {config.max_seq_length} tokens, but {dataset.folder} has "
                f"only {len(rows)} such rows to train on: give more text, or a smaller --batch-size or --max-seq-length"
            )
        total_steps = config.max_steps or max(1, round(config.num_epochs * len(rows) / config.batch_size))
        if config.checkpointing and device.type == "cpu":
            return_freed_memory()
        model = _start(config, dataset, tokenizer)
        if config.weights == "bfloat16":
            narrow_matrices(model)
            model.compute_dtype = torch.float32
        model = model.to(device)
        auxiliary = make_auxiliary(config, teaching.hidden, model.config, total_steps, device)
        trainer = Trainer(model, config, teaching.loss, rows, total_steps, teaching.train, device, auxiliary)
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

    log = RunLog(config, total_steps, state, on_progress, command, with_kd=teaching.train is not None)
    for warning in warnings:
        on_progress(Progress(command, note=warning))
    state = train(
        trainer, state, held_out, teaching.validation, log.step, log.validation,
        lambda at, best: save_checkpoint(config.output_dir, model, tokenizer, trainer.optimizer, at, best, auxiliary),
        lambda at: save_best(config.output_dir, model, tokenizer, at.step),
    )  # fmt: skip
    return TrainResult(config.output_dir, model.config.num_parameters, state, log.last_validation, warnings)


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
    """Hold the run folder for the time of the setup: what it replaces comes back if the setup fails.

    A fresh folder, one whose training never began and the same unfinished run pass; --force replaces a run; anything
    else is refused. Nothing that is not a run's is ever deleted.
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
                f"{config.output_dir} holds a run with another {', '.join(differing)}. Choose another --output-dir, "
                f"give its settings again to continue it (--config {config.output_dir / CONFIG}), or add --force to "
                f"replace it"
            )
        for name in ("data", "tokenizer"):  # made on the way for settings that have changed; nothing was trained
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


def _teaching(config: PretrainConfig, dataset: Dataset, device: torch.device, on_progress: Listener) -> _Teaching:
    if not isinstance(config, DistillConfig):
        return _Teaching(LossConfig(alpha=1.0, beta=0.0))
    if config.cache is None:
        return _live(config, dataset, device)
    return _cached(config, dataset, config.cache, on_progress)


def _live(config: DistillConfig, dataset: Dataset, device: torch.device) -> _Teaching:
    assert config.teacher is not None, "DistillConfig.check sees to it"
    if find_encoder(config.teacher) is not None:
        raise UsageError(
            f"{config.teacher} is an encoder: it gives hidden states, no next tokens. Make a cache of them, with "
            f"`xinslm cache {config.teacher} --sketch-depths 1.0`, and give that as --cache"
        )
    teacher = HuggingFaceTeacher(config.teacher, config.teacher_dtype, device, None, config.trust_remote_code)
    if teacher.tokenizer.fingerprint() != dataset.tokenizer_fingerprint:
        raise UsageError(
            f"a live teacher must share the dataset's tokenizer, and {config.teacher}'s differs from the one of "
            f"{dataset.folder}. Prepare the data with the teacher's, or use `xinslm cache`, which maps nested ones"
        )
    if teacher.max_length < config.max_seq_length:
        raise UsageError(
            f"max_seq_length is {config.max_seq_length}, but teacher {config.teacher} has a context of "
            f"{teacher.max_length} tokens"
        )
    source = LiveTargets(teacher, hidden_shares(config))
    hidden, inputs = find_sketches(config, dataset, source)
    return _Teaching(config.loss, source, source, hidden, (("teacher", teacher.fingerprint), *inputs))


def _cached(config: DistillConfig, dataset: Dataset, folder: Path, on_progress: Listener) -> _Teaching:
    cache, loss, warnings = Cache(folder), config.loss, []
    cache.require_dataset(dataset.fingerprint, dataset.folder)
    cache.verify(on_progress)
    if config.teacher is not None:
        model = find_encoder(config.teacher) or resolve_model(config.teacher)
        cache.require_teacher(model_fingerprint(model), config.teacher)
    hidden, inputs = find_sketches(config, dataset, cache)
    inputs = (("cache", manifest_fingerprint(folder)), *inputs)
    if cache.manifest.get(SKETCH, {}).get("alone"):
        if hidden is None:
            raise UsageError(
                f"cache {folder} is of an encoder and holds hidden states only, but hidden.weight and contrast.weight "
                f"are 0: set one (--hidden.weight 1), or give it as --sketches beside the --cache of a language model"
            )
        note = f"cache {folder} predicts no tokens: the weight loss.beta ({loss.beta}) goes to the cross-entropy"
        return _Teaching(loss, hidden=hidden, inputs=inputs, warnings=(note,) if loss.beta else ())
    if loss.temperature_mode == "full" and loss.temperature not in (1.0, cache.format.temperature):
        raise UsageError(
            f"loss.temperature is {loss.temperature} in mode full, but cache {folder} stores the normaliser for "
            f"{cache.format.temperature}: use that, mode decoupled, or `xinslm cache --temperature {loss.temperature}` "
            f"(a merged cache has the one for 1 alone)"
        )
    cached_length = cache.manifest["config"]["max_seq_length"]
    if cached_length != config.max_seq_length:
        warnings.append(
            f"the teacher saw contexts of {cached_length} tokens when it was cached, the student sees "
            f"{config.max_seq_length}"
        )
    if cache.manifest.get("alignment", {}).get("kind") == "chunks":
        by_split = {name: CachedSpans(cache, name) for name in cache.manifest["shards"]}
        return _Teaching(loss, by_split["train"], by_split.get("validation"), hidden, inputs, tuple(warnings))
    records, held_out = cache.split("train"), cache.split("validation")
    assert records is not None, "every dataset has a train split"
    sources = CachedTargets(records), CachedTargets(held_out) if held_out is not None else None
    return _Teaching(loss, *sources, hidden, inputs, tuple(warnings))


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
            f"model {folder} and dataset {dataset.folder} have different tokenizers; prepare the data with the model's"
        )
    if (longest := load_config(folder).max_position_embeddings) < config.max_seq_length:
        raise UsageError(
            f"max_seq_length is {config.max_seq_length}, but model {folder} has a context of {longest} tokens"
        )
    return load_model(folder, checkpointing=config.checkpointing)


def _resume(folder: Path, facts: dict[str, Any], trainer: Trainer) -> TrainingState:
    """Continue from `last` if the folder has it; otherwise write what a run folder begins with."""
    last = folder / "checkpoints" / "last"
    if (folder / RUN).is_file() and last.is_dir():
        changed = differing_keys(facts, read_json(folder / RUN))
        if changed:
            raise UsageError(
                f"{folder} cannot be continued: {', '.join(changed)} changed since it began. Choose another "
                f"--output-dir, or add --force to begin anew"
            )
        state = load_checkpoint(last, trainer.model, trainer.optimizer)
        if trainer.backward is not None:
            trainer.backward.previous = state.grad_norm or 0.0
        if trainer.auxiliary is not None:
            load_auxiliary(last, trainer.auxiliary)
        if state.step >= trainer.total_steps:
            raise UsageError(f"{folder} already holds this run, finished. Choose another --output-dir, or add --force")
        prune(last.parent)
        cut_metrics(folder / METRICS, state.step)
        return state
    write_json(folder / RUN, facts)
    (folder / METRICS).write_bytes(b"")
    return TrainingState()


def cut_metrics(path: Path, step: int) -> None:
    """Drop lines that belong to steps after the checkpoint, and a half-written last one."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    write_text(path, "".join(kept))


class RunLog:
    """Writes metrics.jsonl and tells the listener."""

    def __init__(
        self,
        config: PretrainConfig,
        total: int,
        start: TrainingState,
        on_progress: Listener,
        stage: str,
        with_kd: bool,
    ) -> None:
        self.path, self.every, self.total = config.output_dir / METRICS, config.log_every, total
        self.on_progress, self.stage, self.with_kd = on_progress, stage, with_kd
        self.since = start
        self.last_validation: Validation | None = None
        if start.step:
            on_progress(Progress(stage, start.step, total, "steps", note=f"continuing after step {start.step}"))

    def _write(self, values: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def step(self, step: Step, state: TrainingState) -> None:
        """Log every `log_every` steps, the first and the last."""
        if step.step % self.every and step.step not in (1, self.total):
            return
        seconds = state.seconds - self.since.seconds
        speed = (state.tokens - self.since.tokens) / max(seconds, 1e-9)
        self.since = state
        kd = {"kd": step.kd} if self.with_kd else {}
        self._write(
            {"step": step.step, "tokens": state.tokens, "loss": step.loss, "ce": step.ce, **kd,
             **step.terms, "lr": step.learning_rate, "grad_norm": step.grad_norm, "tokens_per_second": speed,
             "seconds": state.seconds}
        )  # fmt: skip
        values = {"loss": step.loss, "ce": step.ce, **kd, **step.terms, "lr": step.learning_rate, "tokens/s": speed}
        self.on_progress(Progress(self.stage, step.step, self.total, "steps", values))

    def validation(self, result: Validation, state: TrainingState) -> None:
        """Log a validation."""
        self.last_validation = result
        kd = {} if result.kd is None else {"validation_kd": result.kd}
        self._write({"step": state.step, "tokens": state.tokens, "validation_ce": result.ce, **kd})
        self.on_progress(Progress(self.stage, state.step, self.total, "steps", {"validation": result.ce}, note=""))
