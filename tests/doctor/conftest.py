"""A healthy world: text, tokenizer, dataset, a teacher trained for a moment, its cache, a
student.
"""

import json
from types import SimpleNamespace

import pytest
import torch

import training as train
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.data import prepare
from xinslm.data import train_tokenizer as tokenizer_train
from xinslm.data.config import PrepareConfig
from xinslm.demo.stories import stories
from xinslm.tokenizer.config import TokenizerConfig
from xinslm.train.config import PretrainConfig

SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "max_seq_length": 64,
    "batch_size": 4,
    "device": "cpu",
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("healthy")
    text, tokenizer, data = folder / "text.jsonl", folder / "tokenizer", folder / "data"
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(25_000, 1)))
    tokenizer_train.run(
        TokenizerConfig(data_path=(str(text),), output_dir=tokenizer, vocab_size=400)
    )
    prepare.run(PrepareConfig(data_path=(str(text),), tokenizer_path=tokenizer, output_dir=data))
    for name, steps in (("teacher", 150), ("student", 5)):
        train.run(
            PretrainConfig(data_path=data, output_dir=folder / name, max_steps=steps, **SIZES)
        )
    teacher = folder / "teacher" / "checkpoints" / "best"
    score.run(
        CacheConfig(
            str(teacher),
            data,
            folder / "cache",
            max_seq_length=64,
            shard_positions=3000,
            device="cpu",
        )
    )
    return SimpleNamespace(
        folder=folder,
        data=data,
        tokenizer=tokenizer,
        teacher=teacher,
        cache=folder / "cache",
        student=folder / "student" / "checkpoints" / "best",
    )
