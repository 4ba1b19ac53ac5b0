"""Shared fixtures: a small pipeline made once, the folder of real data, one thread a process."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

# the suite runs on as many processes as there are cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

import training as train
import xinslm.precision
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.data import prepare
from xinslm.data import train_tokenizer as tokenizer_train
from xinslm.data.config import PrepareConfig
from xinslm.demo.stories import stories
from xinslm.distill.config import DistillConfig
from xinslm.tokenizer.config import TokenizerConfig
from xinslm.train.config import PretrainConfig

# `auto` means float32, whatever the processor: results are compared with float32 ones. In
# subprocesses oneDNN, which reads this variable at its first product, has no fast bfloat16.
os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
xinslm.precision.has_fast_bfloat16 = lambda device: False

SMALL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "max_seq_length": 64,
    "batch_size": 4,
    "logging_steps": 1,
    "device": "cpu",
}
# subprocesses have the fixed type, too
STEPS = {"max_steps": 8, "eval_steps": 4, "save_steps": 3, "compute_dtype": "float32"}


@dataclass(frozen=True)
class World:
    folder: Path
    text: Path
    tokenizer: Path
    data: Path
    teacher: Path
    cache: Path
    settings = SMALL

    def distill(self, output_dir: Path, **changes) -> DistillConfig:
        settings = {**STEPS, **SMALL, **changes}
        if "teacher" not in settings:
            settings.setdefault("cache", self.cache)
        return DistillConfig(data_path=self.data, output_dir=output_dir, **settings)

    def pretrain(self, output_dir: Path, **changes) -> PretrainConfig:
        settings = {**STEPS, **SMALL, **changes}
        return PretrainConfig(data_path=self.data, output_dir=output_dir, **settings)


def write_stories(path: Path, num_bytes: int, seed: int) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(num_bytes, seed)))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    text, tokenizer, data = folder / "text.jsonl", folder / "tokenizer", folder / "data"
    write_stories(text, 40_000, seed=1)
    tokenizer_train.run(
        TokenizerConfig(data_path=(str(text),), output_dir=tokenizer, vocab_size=400)
    )
    prepare.run(PrepareConfig(data_path=(str(text),), tokenizer_path=tokenizer, output_dir=data))
    run = folder / "teacher"
    train.run(
        PretrainConfig(
            data_path=data,
            output_dir=run,
            max_steps=30,
            learning_rate=5e-3,
            **{**SMALL, "hidden_size": 48, "num_heads": 3},
        )
    )
    cache = folder / "cache"
    score.run(
        CacheConfig(
            str(run),
            data,
            cache,
            max_seq_length=64,
            shard_positions=3000,
            batch_tokens=512,
            device="cpu",
        )
    )
    return World(folder, text, tokenizer, data, run / "checkpoints" / "best", cache)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real models and text; tests that need it are skipped, by name, where it is
    absent.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("XINSLM_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set XINSLM_TEST_DATA)")
    return folder
