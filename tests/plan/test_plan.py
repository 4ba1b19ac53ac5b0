"""`plan`: sizes and operations against models that are built, measured peaks, and every refusal."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from small_models import save_dataset, save_random_model
from xinslm.cli.arguments import parse
from xinslm.errors import UsageError
from xinslm.model.attention import cut_into_tiles
from xinslm.model.config import PRESETS, ModelConfig
from xinslm.model.param_dtype import cast_matrices_to_bfloat16
from xinslm.model.transformer import Transformer
from xinslm.plan import run as plan_run
from xinslm.plan.config import PlanConfig
from xinslm.plan.memory import kept_by_block, step_memory
from xinslm.plan.work import DEVICES, forward_operations, training_operations
from xinslm.train.config import PretrainConfig
from xinslm.train.optimizers import make_optimizer

GIB = 1 << 30
SMALL = ModelConfig(640, 96, 160, 3, 6, 3, 16)


def settings(**changes) -> PretrainConfig:
    return PretrainConfig(data_path=Path("d"), output_dir=Path("o"), **changes)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_states_are_those_of_a_built_model(
    optimizer: str, weights: str, tied: bool
) -> None:
    shape = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    model, config = Transformer(shape), settings(optimizer=optimizer, param_dtype=weights)
    if weights == "bfloat16":
        cast_matrices_to_bfloat16(model)
    states = make_optimizer(model, config)
    held = sum(
        tensor.nbytes
        for p in model.parameters()
        for key, tensor in states.state_of(p).items()
        if key != "step"
    )
    parts = step_memory(shape, config).parts
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["optimizer states"] == held


@pytest.mark.parametrize("parts", [{}, {"attention_bias": True}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("by_tiles", [True, False])
def test_a_block_keeps_for_its_backward_pass_what_the_formula_says(
    by_tiles: bool, kv_heads: int, parts: dict[str, bool]
) -> None:
    shape, rows, length = ModelConfig(640, 96, 160, 1, 4, kv_heads, 32, **parts), 2, 64
    model = Transformer(shape).train()
    cos, sin = model.rotary(torch.arange(length)[None], torch.float32)
    mask = None if not by_tiles else cut_into_tiles([[40, 24]] * rows, None, 4)
    given = {t.data_ptr() for t in (cos, sin, *model.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model.layers[0](torch.randn(rows, length, 96, requires_grad=True), cos, sin, mask)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    sums = 4 * 4 * rows * length  # a number for each query, which tiles do not need
    assert counted == kept_by_block(shape, rows * length, 4) - by_tiles * sums


def test_operations_are_those_that_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, length = Transformer(SMALL), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model.hidden(torch.zeros(1, length, dtype=torch.int64)))
    blocks, head = forward_operations(SMALL, length)
    counted = counter.get_total_flops()
    # it counts attention over the whole square
    whole = SMALL.num_hidden_layers * 4 * length / 2 * 96
    assert length * (blocks + head + whole) == pytest.approx(counted, rel=1e-9)


def test_training_costs_three_forward_passes_and_checkpointing_one_more() -> None:
    blocks, head = forward_operations(SMALL, 128)
    plain, again = (
        training_operations(SMALL, settings(max_seq_length=128, gradient_checkpointing=flag))
        for flag in (False, True)
    )
    assert plain == 3 * (blocks + head) and again - plain == blocks


@pytest.mark.parametrize("kv_heads", [3, 6])
def test_muon_costs_the_operations_that_pytorch_counts(kv_heads: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = dataclasses.replace(SMALL, num_key_value_heads=kv_heads)
    config = settings(max_seq_length=128, batch_size=2, optimizer="muon")
    model = Transformer(shape)
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    adamw = dataclasses.replace(config, optimizer="adamw")
    planned = training_operations(shape, config) - training_operations(shape, adamw)
    assert planned * 2 * 128 == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_savings_save_in_the_order_that_is_known() -> None:
    """The 1B preset of the reference: 16 bytes a parameter for plain AdamW, and within 12 GiB with
    everything on.
    """
    shape = ModelConfig(vocab_size=32_000, **vars(PRESETS["1b"]))
    base = settings(max_seq_length=2048, batch_size=1)
    chain = [
        base,
        dataclasses.replace(base, gradient_checkpointing=True),
        dataclasses.replace(base, gradient_checkpointing=True, optimizer="adamw8bit"),
        dataclasses.replace(
            base, gradient_checkpointing=True, optimizer="adamw8bit", optimizer_in_backward=True
        ),
        dataclasses.replace(
            base,
            gradient_checkpointing=True,
            optimizer="adamw8bit",
            optimizer_in_backward=True,
            param_dtype="bfloat16",
        ),
    ]
    peaks = [step_memory(shape, config).peak / GIB for config in chain]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] > 16 * shape.num_parameters / GIB and peaks[-1] < 7


MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import plan_accuracy
settings = json.loads(sys.argv[2])
print(json.dumps([plan_accuracy.planned(settings), plan_accuracy.measured(settings)[0]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="reads the kernel's high-water mark, Linux's"
)
def test_a_planned_peak_is_the_measured_one() -> None:
    """`benchmarks/plan_accuracy.py` has more of them."""
    changes = {"preset": "10m", "batch_size": 4, "max_seq_length": 256}
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    command = [sys.executable, "-c", MEASURE, str(benchmarks), json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, measured = json.loads(done.stdout)
    assert planned == pytest.approx(measured, rel=0.15)


def planned(**changes) -> plan_run.PlanResult:
    return plan_run.run(
        PlanConfig(**{"preset": "1m", "max_steps": 10, "vocab_size": 4096, **changes})
    )


def test_a_plan_says_what_fits_and_what_would(monkeypatch) -> None:
    monkeypatch.setattr(plan_run, "measure_here", lambda shape, config: DEVICES[0])
    result = planned(preset="1b", batch_size=4, max_seq_length=2048, memory=12.0, vocab_size=32_000)
    assert "does not fit in 12 GiB; with --" in result.advice
    wanted = result.advice.partition("with ")[2].partition(" it needs")[0].split()
    words = [
        "--preset",
        "1b",
        "--batch-size",
        "4",
        "--max-seq-length",
        "2048",
        "--memory",
        "12",
        "--max-steps",
        "1",
    ]
    if "--batch-size" in wanted:
        del words[2:4]
    again = plan_run.run(parse(PlanConfig, [*words, "--vocab-size", "32000", *wanted]))
    assert again.advice == "fits in 12 GiB" and again.needed <= 12 * GIB
    assert "with any setting" in planned(preset="1b", memory=1.0).advice
    text = result.describe()
    assert "1,018,123,776 parameters" in text and "H100" in text and "fits" in text


def test_a_plan_knows_dataset_teacher_and_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plan_run, "measure_here", lambda shape, config: DEVICES[0])
    data = save_dataset(tmp_path / "data", "a tokenizer")
    teacher = save_random_model(tmp_path / "teacher")
    cached = planned(
        data_path=data,
        vocab_size=None,
        teacher=str(tmp_path / "teacher"),
        cache=Path("c"),
        max_steps=None,
    )
    cache, train = cached.stages
    tokens = (data / "train" / "tokens.bin").stat().st_size // 2
    assert cached.tokens == tokens and cached.shape.vocab_size == 320
    assert cache.written == 38 * tokens and not cached.other_models
    numbers = sum(p.numel() for p in teacher.parameters())
    assert cache.operations == 2 * numbers * tokens and train.written > 0
    live = planned(data_path=data, vocab_size=None, teacher=str(tmp_path / "teacher"))
    assert live.other_models == {"live teacher": 4 * numbers}


def test_what_a_plan_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="how much is to be trained on"):
        plan_run.run(PlanConfig())
    with pytest.raises(UsageError, match="is not a dataset folder"):
        plan_run.run(PlanConfig(data_path=tmp_path))
    with pytest.raises(UsageError, match=r"memory is 0\.0, but must be above 0"):
        plan_run.run(PlanConfig(max_steps=1, memory=0.0))
    assert "32,000 is assumed" in planned(vocab_size=None).notes[0]


def test_a_recipe_of_distill_can_be_planned(capsys) -> None:
    from xinslm.cli.main import main

    recipe = Path(__file__).resolve().parents[2] / "configs" / "distillation_config.yaml"
    assert main(["plan", "--config", str(recipe), "--tokens", "1000000", "--memory", "16"]) == 0
    assert "fits in 16 GiB" in capsys.readouterr().out
