"""The stage `plan`: estimate what a run of `distill` or `pretrain` needs, without starting it.

xinslm plan --config configs/distillation_config.yaml --data-path data --memory 16
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xinslm.cache.config import default_top_k
from xinslm.cache.entries import CacheFormat
from xinslm.cache.entry_files import SparseLayout
from xinslm.device import pick_device
from xinslm.errors import UsageError
from xinslm.files import MANIFEST
from xinslm.model.config import ModelConfig
from xinslm.plan.config import PlanConfig
from xinslm.plan.measured import measure_here
from xinslm.plan.memory import RUNTIME_GIB, Memory, step_memory
from xinslm.plan.work import DEVICES, Device, training_operations
from xinslm.precision import compute_dtype, weight_dtype
from xinslm.progress import Listener, Progress, ignore
from xinslm.train.inputs import shape

GIB = 1 << 30
MEAN_TAIL = 0.17
"""Mass outside the top k of a cache, on average: SmolLM2-135M-Instruct's on chats, outside 4."""
SAVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--gradient-checkpointing", {"gradient_checkpointing": True}),
    ("--micro-batch-size 1", {"micro_batch_size": 1}),
    ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}),
    (
        "--batch-size 1 --optimizer-in-backward",
        {"batch_size": 1, "micro_batch_size": None, "optimizer_in_backward": True},
    ),
    ("--param-dtype bfloat16", {"param_dtype": "bfloat16"}),
)
"""Settings that save memory, the cheapest first."""


@dataclass(frozen=True)
class Stage:
    """A stage's operations, and the bytes it writes."""

    name: str
    operations: float
    dtype: str
    written: int

    def seconds(self, device: Device) -> float:
        """Time on this device."""
        return device.seconds(self.operations, self.dtype, is_scoring=self.name == "cache")


@dataclass(frozen=True)
class PlanResult:
    """Memory, time and storage of a run."""

    config: PlanConfig
    shape: ModelConfig
    tokens: int
    memory: Memory
    other_models: dict[str, int]
    """Bytes of other models in memory: a live teacher."""
    stages: tuple[Stage, ...]
    devices: tuple[Device, ...]
    advice: str
    notes: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Bytes of the process at its peak."""
        return self.memory.peak + sum(self.other_models.values()) + int(RUNTIME_GIB * GIB)

    def describe(self) -> str:
        """Tables for the terminal."""
        config = self.config
        lines = [
            f"model     {self.shape.num_parameters:,} parameters, vocabulary "
            f"{self.shape.vocab_size:,}",
            f"training  {self.tokens:,} tokens in steps of {config.batch_size} rows of "
            f"{config.max_seq_length}",
            "",
            f"memory    {self.needed / GIB:.2f} GiB at the peak ({self.memory.moment})",
        ]
        parts = {
            **self.memory.parts,
            **self.other_models,
            "Python and PyTorch": int(RUNTIME_GIB * GIB),
        }
        lines += [f"  {name:<24}{size / GIB:8.2f} GiB" for name, size in parts.items() if size]
        lines += [f"  {self.advice}"] if self.advice else []
        lines += ["", f"  {'stage':<10}{'operations':>12}{'per token':>12}{'writes':>12}"]
        lines += [
            "  "
            f"{stage.name:<10}{stage.operations:>12.2e}"
            f"{stage.operations / max(self.tokens, 1):>12.2e}"
            f"{_size(stage.written):>12}"
            for stage in self.stages
        ]
        width = max(len(device.name) for device in self.devices) + 2
        lines += [
            "",
            f"  {'time':<{width}}{''.join(f'{s.name:>12}' for s in self.stages)}  of peak  fits",
        ]
        for device in self.devices:
            seconds = [stage.seconds(device) for stage in self.stages]
            fits = (
                "-"
                if device.memory_gib is None
                else "yes"
                if self.needed <= 0.9 * device.memory_gib * GIB
                else "no"
            )
            price = (
                ""
                if config.hourly_price is None
                else f"  {sum(seconds) / 3600 * config.hourly_price:,.2f} total"
            )
            times = "".join(f"{_time(s):>12}" for s in seconds)
            lines.append(f"  {device.name:<{width}}{times}{device.share:9.0%}{fits:>6}{price}")
        return "\n".join(lines + [f"note      {note}" for note in self.notes])


def run(config: PlanConfig, on_progress: Listener = ignore) -> PlanResult:
    """Estimate memory, time and storage. Raises UsageError if the amount of training is not
    given.
    """
    config.check()
    vocabulary, tokens, notes = _data(config)
    student = shape(config, _Vocabulary(vocabulary))
    device = pick_device(config.device)
    resolved = compute_dtype(config.compute_dtype, device)
    products: Any = str(resolved).removeprefix("torch.")
    config = replace(config, compute_dtype=products)
    trained = round(tokens * config.num_epochs)
    if config.max_steps is not None:
        trained = config.max_steps * config.batch_size * config.max_seq_length
    numbers, dtype = _teacher(config), config.teacher_dtype
    stages, other_models = [], {}
    if numbers and config.cache is None and config.teacher is not None:
        other_models["live teacher"] = round(numbers * weight_dtype(dtype, device).itemsize)
        notes += (
            "the teacher is in memory together with the student; a cache (`xinslm cache`) saves "
            "that memory, and the teacher's time",
        )
    if numbers:
        top_k = default_top_k(config.top_k, config.tail_sample_mass)
        fmt = CacheFormat(vocabulary, top_k, config.tail_sample_mass, 2.0)
        entry = SparseLayout(fmt).mean_bytes(MEAN_TAIL)
        products = config.compute_dtype if dtype == "auto" else dtype
        stages.append(Stage("cache", 2.0 * numbers * tokens, products, round(tokens * entry)))
    written = _checkpoint(student, config)
    operations = training_operations(student, config) * trained
    stages.append(Stage("train", operations, config.compute_dtype, written))
    needed = step_memory(student, config)
    on_progress(Progress("measure this machine"))
    here = measure_here(student, config)
    result = PlanResult(
        config,
        student,
        trained,
        needed,
        other_models,
        tuple(stages),
        (here, *DEVICES),
        "",
        notes,
    )
    return replace(result, advice=_advice(result))


class _Vocabulary:
    """The part of a tokenizer that `shape` needs."""

    bos_id = eos_id = pad_id = None

    def __init__(self, size: int) -> None:
        self.vocab_size = size


def _data(config: PlanConfig) -> tuple[int, int, tuple[str, ...]]:
    """Vocabulary size, training tokens and notes."""
    if config.data_path is not None and (config.data_path / MANIFEST).is_file():
        from xinslm.data.dataset import open_dataset

        manifest = open_dataset(config.data_path).manifest
        return manifest["vocab_size"], config.tokens or manifest["splits"]["train"]["tokens"], ()
    if config.data_path is not None:
        raise UsageError(
            f"{config.data_path} is not a dataset folder: make one with `xinslm prepare`, or give "
            "--tokens and --vocab-size"
        )
    size = config.vocab_size
    if size is None and config.tokenizer_path is not None:
        from xinslm.tokenizer.load import load_tokenizer

        size = load_tokenizer(config.tokenizer_path).vocab_size
    assumed = (
        ()
        if size is not None
        else ("a vocabulary of 32,000 is assumed; set it with --vocab-size or --data-path",)
    )
    tokens = config.tokens or (config.max_steps or 0) * config.batch_size * config.max_seq_length
    return size or 32_000, tokens, assumed


def _teacher(config: PlanConfig) -> float:
    """Parameters of the teacher, 0 if unknown."""
    if config.teacher_parameters is not None:
        return config.teacher_parameters * 1e9
    if config.teacher is None or not Path(config.teacher).exists():
        return 0.0
    from xinslm.model.files import open_model

    return float(open_model(config.teacher).num_weights)


def _checkpoint(student: ModelConfig, config: PlanConfig) -> int:
    """Bytes of `last` and `best` together."""
    parts = step_memory(student, config).parts
    return 2 * parts["weights"] + parts["optimizer states"]


def _advice(result: PlanResult) -> str:
    """Say if the run fits and, if not, which settings would make it fit."""
    if result.config.memory is None:
        return ""
    available = result.config.memory * GIB
    if result.needed <= available:
        return f"fits in {result.config.memory:g} GiB"
    other_models = result.needed - result.memory.peak
    for count in range(1, len(SAVERS) + 1):
        for chosen in itertools.combinations(SAVERS, count):
            changes = {key: value for _, change in chosen for key, value in change.items()}
            if "optimizer_in_backward" in changes and "--micro-batch-size 1" in [
                flag for flag, _ in chosen
            ]:
                continue
            config = replace(result.config, **changes)
            if all(getattr(result.config, k) == v for k, v in changes.items()):
                continue
            if PlanConfig.errors(config):
                continue
            peak = step_memory(result.shape, config).peak + other_models
            if peak <= available:
                flags = " ".join(flag for flag, _ in chosen)
                return (
                    f"does not fit in {result.config.memory:g} GiB; with {flags} it needs "
                    f"{peak / GIB:.2f} GiB"
                )
    return (
        f"does not fit in {result.config.memory:g} GiB with any setting: use a smaller model or "
        "shorter rows"
    )


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _time(seconds: float) -> str:
    for unit, length in (("s", 60.0), ("min", 60.0), ("h", 48.0)):
        if seconds < 2 * length:
            return f"{seconds:.3g} {unit}"
        seconds /= 60 if unit != "h" else 24
    return f"{seconds:.3g} days"
