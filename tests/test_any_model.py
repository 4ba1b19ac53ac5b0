"""Any model file is a model: each command with each kind of model, and the same results.

The kinds hold the same weights: values of a grid, as a Hugging Face folder, a run folder, the
quantized folder they come from, and what is exported of it: a GGUF file, a folder of
compressed-tensors, one of MLX.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from xinslm.cache.config import CacheConfig
from xinslm.commands import COMMANDS, run
from xinslm.data.config import PrepareConfig
from xinslm.doctor.config import CompareConfig, DoctorConfig
from xinslm.evaluate.benchmark.config import BenchmarkConfig
from xinslm.evaluate.config import EvaluateConfig
from xinslm.export.config import (
    AllConfig,
    CoremlConfig,
    GgufConfig,
    HfConfig,
    ImportConfig,
    MlxConfig,
    PackedConfig,
)
from xinslm.export.coreml.package import Package
from xinslm.inference.config import ChatConfig, GenerateConfig, NativeConfig
from xinslm.inference.native_info import run as native_info
from xinslm.model.files import load_model, open_model
from xinslm.model.grids import decode
from xinslm.plan.config import PlanConfig
from xinslm.prune.config import PruneConfig
from xinslm.quantize.config import QuantizeConfig
from xinslm.rollouts.onpolicy_config import OnPolicyConfig
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.tokenizer.config import ShowConfig, TokenizerConfig
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train.lora_config import AdaptConfig

KINDS = ("folder", "run", "quantized", "gguf", "compressed-tensors", "mlx")
TRAIN = {"max_seq_length": 64, "batch_size": 4}
FREE = {**TRAIN, "max_steps": 2, "device": "cpu"}
World = Any
"""The fixture `world` of conftest.py."""


@dataclass(frozen=True)
class Kinds:
    world: World
    paths: dict[str, Path]


@pytest.fixture(scope="module")
def kinds(world, tmp_path_factory) -> Kinds:
    root = tmp_path_factory.mktemp("kinds")
    paths = {name: root / name for name in KINDS} | {"gguf": root / "model.gguf"}
    run(QuantizeConfig(world.teacher, paths["quantized"], method="rtn", bits=8))
    run(GgufConfig(paths["quantized"], paths["gguf"]))
    run(ImportConfig(paths["gguf"], paths["folder"]))
    run(HfConfig(paths["quantized"], paths["compressed-tensors"]))
    run(MlxConfig(paths["quantized"], paths["mlx"]))
    (paths["run"] / "checkpoints").mkdir(parents=True)
    shutil.copytree(paths["folder"], paths["run"] / "checkpoints" / "best")
    return Kinds(world, paths)


def first_weight(model: Path) -> torch.Tensor:
    return next(iter(load_model(model).parameters())).detach()


def coreml_weight(w: World, m: Path, out: Path) -> torch.Tensor:
    """The embedding, as float16 holds it."""
    pytest.importorskip("coremltools")
    run(CoremlConfig(m, out, max_seq_length=16))
    package, name = Package(out / "model.mlpackage"), "model.embed_tokens.weight"
    found = package.quantized(name)
    if found is None:
        return torch.from_numpy(package.plain(name).copy())
    codes, scales = (torch.from_numpy(part.copy()) for part in found)
    return decode(codes, scales).half()


def evaluate(w: World, m: Path, out: Path) -> object:
    config = EvaluateConfig(m, (str(w.data),), max_documents=3, device="cpu", max_seq_length=64)
    return round(run(config).bits_per_byte, 6)


def benchmark(w: World, m: Path, out: Path) -> object:
    pytest.importorskip("lm_eval")
    task = out.with_suffix(".jsonl")
    task.parent.mkdir(parents=True, exist_ok=True)
    task.write_text('{"prompt": "Say yes.", "reference": "yes"}\n')
    run(BenchmarkConfig(m, (str(task),), device="cpu", max_new_tokens=4, output_path=out))
    return json.loads(out.read_text())["items"][task.name][0]["answers"]


def synthesize(w: World, m: Path, out: Path) -> object:
    prompts = out.with_suffix(".txt")
    prompts.parent.mkdir(parents=True)
    prompts.write_text("One morning\nThere was\n")
    sampling = {"temperature": 0.0, "max_new_tokens": 8, "max_seq_length": 64, "device": "cpu"}
    run(SynthesizeConfig(str(m), prompts, out, **sampling))
    return (out / "text.jsonl").read_text()


def onpolicy(w: World, m: Path, out: Path) -> object:
    sizes = {"completions": 4, "max_new_tokens": 6, "rounds": 1, "prompt_tokens": 8}
    sizes |= {"teacher": str(m), "prompts": w.data, "device": "cpu"}
    return run(OnPolicyConfig(student=m, output_dir=out, **sizes, **TRAIN)).texts


def train_from(kind: str) -> Callable[[World, Path, Path], object]:
    def start(w: World, m: Path, out: Path) -> object:
        shapeless = {
            name: None for name in w.settings if name not in FREE and name != "logging_steps"
        }
        make = {"pretrain": w.pretrain, "distill": w.distill}[kind]
        return run(make(out, init_from=m, **shapeless, **FREE)).state.step

    return start


def live(w: World, m: Path, out: Path) -> object:
    return run(w.distill(out, teacher=str(m), **FREE)).state.step


def adapt(w: World, m: Path, out: Path) -> object:
    pytest.importorskip("peft")
    result = run(AdaptConfig(teacher=str(m), data_path=w.data, output_dir=out, lora_r=2, **FREE))
    return round(result.before, 5)


def cache(w: World, m: Path, out: Path) -> object:
    run(CacheConfig(str(m), w.data, out, max_seq_length=64, device="cpu"))
    return (out / "validation" / "00000.bin").read_bytes()[:400]


def doctor(w: World, m: Path, out: Path) -> object:
    made = out.with_name("cache")
    run(CacheConfig(str(m), w.data, made, max_seq_length=64, device="cpu"))
    config = DoctorConfig(w.data, cache=made, teacher=str(m), student=m, device="cpu")
    return run(config).failed


def compare(w: World, m: Path, out: Path) -> object:
    """With itself, and with the model that was quantized."""
    return [run(CompareConfig(m, other)).failed for other in (m, w.teacher)]


def talk(w: World, m: Path, out: Path) -> object:
    said, typed = [], iter(["Hi"])

    def read(prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    config = ChatConfig(model=m, max_new_tokens=6, temperature=0.0, device="cpu")
    COMMANDS["chat"].load("run")(config, read, said.append)
    return "".join(said).replace(str(m), "M").splitlines()[:2]


def plan(w: World, m: Path, out: Path) -> object:
    text = run(PlanConfig(data_path=w.data, teacher=str(m))).describe()
    return [line for line in text.splitlines() if " s " not in line]  # speeds are measured


def made(config: Callable[[World, Path, Path], object]) -> Callable[[World, Path, Path], object]:
    """Run a command that writes a model; the result is its first weight."""

    def start(w: World, m: Path, out: Path) -> object:
        run(config(w, m, out))
        return next(iter(load_model(out).parameters())).detach()

    return start


USES: dict[str, dict[str, Callable[[World, Path, Path], object]]] = {
    "benchmark": {"model": benchmark},
    "tokenizer train": {
        "prefix_of": lambda w, m, out: (
            run(TokenizerConfig(out, prefix_of=m, vocab_size=300))
            and load_tokenizer(out).vocab_size
        )
    },
    "tokenizer show": {"tokenizer_path": lambda w, m, out: run(ShowConfig("One morning", m)).ids},
    "prepare": {
        "tokenizer_path": lambda w, m, out: (
            run(PrepareConfig((str(w.text),), m, out))
            and (out / "train" / "tokens.bin").read_bytes()[:100]
        )
    },
    "pretrain": {"init_from": train_from("pretrain")},
    "distill": {"init_from": train_from("distill"), "teacher": live},
    "adapt": {"teacher": adapt},
    "cache": {"teacher": cache},
    "synthesize": {"teacher": synthesize},
    "onpolicy": {"student": onpolicy},
    "doctor": {"teacher": doctor},
    "doctor compare": {"model": compare},
    "plan": {"teacher": plan},
    "evaluate": {"model": evaluate},
    "export packed": {
        "model": lambda w, m, out: run(PackedConfig(m, out.parent.with_suffix(".packed"))).matrices
    },
    "native": {"model": lambda w, m, out: native_info(NativeConfig(model=m)).problem},
    "generate": {
        "model": lambda w, m, out: (
            run(
                GenerateConfig(
                    model=m, prompt="One", max_new_tokens=8, temperature=0.0, device="cpu"
                )
            ).text
        )
    },
    "chat": {"model": talk},
    "prune": {
        "teacher": made(
            lambda w, m, out: PruneConfig(
                teacher=str(m),
                data_path=w.data,
                output_dir=out,
                num_layers=1,
                max_seq_length=64,
                device="cpu",
            )
        )
    },
    "quantize": {
        "model": made(
            lambda w, m, out: QuantizeConfig(
                m, out, data_path=w.data, num_calibration_samples=4, max_seq_length=64
            )
        )
    },
    "import": {"model": made(lambda w, m, out: ImportConfig(m, out))},
    "export gguf": {
        "model": lambda w, m, out: (
            run(GgufConfig(m, out.with_suffix(".gguf"), outtype="f32"))
            and first_weight(out.with_suffix(".gguf"))
        )
    },
    "export hf": {"model": lambda w, m, out: run(HfConfig(m, out)) and first_weight(out)},
    "export all": {
        "model": lambda w, m, out: run(AllConfig(m, out)) and first_weight(out / "model.gguf")
    },
    "export mlx": {"model": lambda w, m, out: run(MlxConfig(m, out)) and first_weight(out)},
    "export coreml": {"model": coreml_weight},
}
TAKE_MODELS = {"model", "teacher", "student", "init_from", "tokenizer_path", "prefix_of"}
"""Options of commands that are a model or a tokenizer."""


def test_each_command_that_takes_a_model_is_tried():
    for name, command in COMMANDS.items():
        fields = {field.name for field in dataclasses.fields(command.load("config"))}
        if name not in ("demo", "report", "cache merge", "publish") and fields & TAKE_MODELS:
            assert USES[name].keys() <= fields, name
    assert USES.keys() == COMMANDS.keys() - {"demo", "report", "cache merge", "publish"}


@pytest.mark.parametrize(
    ("command", "option"), [(name, option) for name, uses in USES.items() for option in uses]
)
def test_each_kind_of_model_gives_the_same(kinds, tmp_path, command, option):
    use = USES[command][option]
    found = {
        kind: use(kinds.world, path, tmp_path / kind / "out") for kind, path in kinds.paths.items()
    }
    for kind, value in found.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, found["folder"]), kind
        else:
            assert value == found["folder"], kind


def test_the_kinds_hold_the_same_weights(kinds):
    expected = load_model(kinds.paths["folder"]).state_dict()
    for kind, path in kinds.paths.items():
        source, found = open_model(path), load_model(path).state_dict()
        names = {"run": "model", "folder": "model", "gguf": "gguf"}
        assert source.kind == names.get(kind, "quantized")
        assert all(torch.equal(found[name], weight) for name, weight in expected.items()), kind
