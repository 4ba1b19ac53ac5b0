"""A small world, made once: text, a tokenizer, a dataset, a teacher trained for a moment, its
cache.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.demo.texts import stories
from xinslm.distill import train
from xinslm.distill.cache import score
from xinslm.distill.cache.config import CacheConfig
from xinslm.distill.config import DistillConfig, PretrainConfig
from xinslm.tokenizer import train as tokenizer_train
from xinslm.tokenizer.config import TrainConfig

SMALL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "max_seq_length": 64,
    "batch_size": 4,
    "log_every": 1,
    "device": "cpu",
}


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
        settings = {**SMALL, "max_steps": 8, "validate_every": 4, "save_every": 3, **changes}
        if "teacher" not in settings:
            settings.setdefault("cache", self.cache)
        return DistillConfig(data_path=self.data, output_dir=output_dir, **settings)

    def pretrain(self, output_dir: Path, **changes) -> PretrainConfig:
        settings = {**SMALL, "max_steps": 8, "validate_every": 4, "save_every": 3, **changes}
        return PretrainConfig(data_path=self.data, output_dir=output_dir, **settings)


def write_stories(path: Path, num_bytes: int, seed: int) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(num_bytes, seed)))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    text, tokenizer, data = folder / "text.jsonl", folder / "tokenizer", folder / "data"
    write_stories(text, 40_000, seed=1)
    tokenizer_train.run(TrainConfig(data_path=(str(text),), output_dir=tokenizer, vocab_size=400))
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
