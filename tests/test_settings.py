"""Settings of every command: every number has a range, and all that is outside is named at once."""

import math
import re
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from xinslm.cache.config import CacheConfig
from xinslm.commands import COMMANDS
from xinslm.distill.auxiliary_config import ContrastConfig, HiddenConfig
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError
from xinslm.inference.config import GenerateConfig
from xinslm.losses.config import LossConfig
from xinslm.plan.config import PlanConfig
from xinslm.quantize.config import QuantizeConfig
from xinslm.ranges import Settings
from xinslm.tokenizer.config import TokenizerConfig
from xinslm.train import inputs
from xinslm.train.config import PretrainConfig

CLASSES = [command.load("config") for command in COMMANDS.values()]
GIVEN = {DistillConfig: {"cache": Path("c")}, QuantizeConfig: {"data_path": Path("d")}}
"""What a class needs beyond its required fields."""
GIVEN |= {PlanConfig: {"data_path": Path("d")}, TokenizerConfig: {"data_path": ("d",)}}


def sections() -> dict[type, tuple[type, str]]:
    """Each configuration inside another, with the first class and field that holds it."""
    found: dict[type, tuple[type, str]] = {}
    for cls in CLASSES:
        for name, hint in typing.get_type_hints(cls).items():
            if is_dataclass(hint):
                found.setdefault(hint, (cls, name))
    return found


SECTIONS = sections()
EVERY = [*CLASSES, *SECTIONS]


def make(cls, **changes):
    """A configuration with a value for each required field."""
    samples = {str: "x", Path: Path("x"), tuple[str, ...]: ("x",)}
    samples[tuple[Path, ...]] = (Path("a"), Path("b"))
    hints = typing.get_type_hints(cls)
    needed = {
        field.name: samples[hints[field.name]]
        for field in fields(cls)
        if field.default is MISSING and field.default_factory is MISSING
    }
    return cls(**{**needed, **GIVEN.get(cls, {}), **changes})


def check(cls, **changes) -> None:
    """Check a configuration; one inside another as part of the command's."""
    if cls in SECTIONS:
        owner, name = SECTIONS[cls]
        make(owner, **{name: cls(**changes)}).check()
    else:
        make(cls, **changes).check()


def numbers():
    """Every numeric field of every configuration, found by its type, not by the table under
    test.
    """
    for cls in EVERY:
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            hint = hints[field.name]
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            if int in kinds or float in kinds:
                yield pytest.param(
                    cls, field.name, float in kinds, id=f"{cls.__name__}.{field.name}"
                )


@pytest.mark.parametrize(("cls", "name", "is_float"), numbers())
def test_no_number_is_taken_unseen(cls, name: str, is_float: bool) -> None:
    for value in (-1.0, math.nan, math.inf, -math.inf) if is_float else (-1, -(10**400)):
        with pytest.raises(UsageError, match=name):
            check(cls, **{name: value})


def test_the_defaults_and_the_ends_of_the_ranges_are_taken() -> None:
    for cls in EVERY:
        check(cls)
    check(CacheConfig, top_k=256, tail_sample_mass=1.0, max_seq_length=1_000_000, seed=2**31 - 1)
    check(
        CacheConfig,
        top_k=1,
        tail_sample_mass=0.0,
        max_seq_length=2,
        seed=0,
        batch_tokens=1,
        shard_positions=1,
    )
    check(LossConfig, alpha=0, tail_weight=0)
    check(
        PretrainConfig,
        adam_beta1=0,
        adam_beta2=0,
        max_grad_norm=0,
        weight_decay=0,
        max_eval_samples=0,
        max_steps=1,
    )
    check(
        PretrainConfig,
        batch_size=1_000_000,
        max_seq_length=1_000_000,
        warmup_ratio=0,
        decay_ratio=1,
    )
    check(
        PretrainConfig,
        num_heads=1,
        num_kv_heads=1,
        sliding_window=1,
        num_epochs=0.01,
        seed=2**31 - 1,
    )


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (CacheConfig, {"top_k": 257}, r"^top_k is 257, but must be at most 256$"),
        (CacheConfig, {"tail_sample_mass": 0.003}, r"must be at least 0.004, or 0$"),
        (CacheConfig, {"tail_sample_mass": 1.5}, r"must be at most 1, or 0$"),
        (CacheConfig, {"max_seq_length": 1}, r"^max_seq_length is 1, but must be at least 2$"),
        (CacheConfig, {"max_seq_length": 1_000_001}, "at most 1,000,000"),
        (CacheConfig, {"temperature": 0.0}, r"^temperature is 0.0, but must be above 0$"),
        (CacheConfig, {"seed": 2**31}, "at most 2,147,483,647"),
        (
            CacheConfig,
            {"hidden_state_depths": (0.0, 1.0)},
            r"^hidden_state_depths has 0.0, but each must be above 0$",
        ),
        (
            CacheConfig,
            {"hidden_state_depths": (1.0, 0.5)},
            r"^hidden_state_depths must rise from one to the next: 1.0 0.5$",
        ),
        (
            HiddenConfig,
            {"depths": (0.5, 1.5)},
            r"^hidden.depths has 1.5, but each must be at most 1$",
        ),
        (
            HiddenConfig,
            {"depths": (math.nan,)},
            r"^hidden.depths has nan, but each must be a finite number$",
        ),
        (HiddenConfig, {"depths": (), "weight": 1.0}, "hidden.depths is empty"),
        (HiddenConfig, {"until": 0.0}, r"^hidden.until is 0.0, but must be above 0$"),
        (ContrastConfig, {"positions": 1}, r"^contrast.positions is 1, but must be at least 2$"),
        (DistillConfig, {"hidden_states": Path("s")}, "hidden_states has no effect"),
        (LossConfig, {"tail_weight": 1.5}, r"^loss.tail_weight is 1.5, but must be at most 1$"),
        (LossConfig, {"alpha": 0, "beta": 0}, "both 0"),
        (PretrainConfig, {"adam_beta2": 1.0}, r"^adam_beta2 is 1.0, but must be below 1$"),
        (PretrainConfig, {"num_epochs": 0.0}, "num_epochs is 0.0, but must be above 0"),
        (PretrainConfig, {"max_steps": 0}, "max_steps is 0, but must be at least 1"),
        (PretrainConfig, {"learning_rate": 0}, "learning_rate is 0, but must be above 0"),
        (PretrainConfig, {"warmup_ratio": 0.8}, "must not add up to more than 1"),
        (
            PretrainConfig,
            {"batch_size": 1_000_001},
            "batch_size is 1000001, but must be at most 1,000,000",
        ),
        (
            PretrainConfig,
            {"batch_size": 4, "micro_batch_size": 3},
            r"micro_batch_size \(3\) must divide batch_size \(4\)",
        ),
        *(
            (PretrainConfig, {name: 0}, f"^{name} is 0, but must be at least 1$")
            for name in (
                "hidden_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "intermediate_size",
            )
        ),
        (PretrainConfig, {"vocab_size": 0}, "vocab_size is 0"),
        (PretrainConfig, {"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_what_is_out_of_range_is_said(cls, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(cls, **changes)


@pytest.mark.parametrize("cls", EVERY)
def test_every_class_reports_all_its_errors_at_once(cls) -> None:
    assert issubclass(cls, Settings) and (cls in SECTIONS or make(cls).errors() == [])
    names = list(dict.fromkeys(param.values[1] for param in numbers() if param.values[0] is cls))
    if not names:
        return
    with pytest.raises(UsageError) as caught:
        check(cls, **dict.fromkeys(names, -(10**6)))
    assert all(re.search(rf"\b{name} (is )?\(?-1000000", str(caught.value)) for name in names)


def test_contradictions_are_reported_with_the_ranges() -> None:
    wrong = make(QuantizeConfig, bits=3, seed=-1, num_calibration_samples=0).errors()
    assert [error.split()[0] for error in wrong] == ["num_calibration_samples", "seed", "bits"]
    wrong = make(TokenizerConfig, prefix_of=Path("t"), min_frequency=2, vocab_size=0).errors()
    assert len(wrong) == 2 and "--min-frequency has no effect" in wrong[1]
    wrong = make(GenerateConfig, prompt="a", prompt_file=Path("b"), max_new_tokens=0).errors()
    assert len(wrong) == 2 and "not both" in wrong[1]


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        check(PretrainConfig, hidden_size=0, seed=-5, max_grad_norm=math.nan)
    assert len(str(caught.value).splitlines()) == 3


def test_raw_text_takes_the_tokenizer_of_a_run_folder_as_teacher(world, tmp_path: Path) -> None:
    run = world.teacher.parents[1]
    config = DistillConfig(
        data_path=world.text, output_dir=tmp_path / "run", teacher=str(run), device="cpu"
    )
    dataset = inputs.find_dataset(config, lambda progress: None)
    assert dataset.tokenizer_fingerprint == inputs.open_dataset(world.data).tokenizer_fingerprint
