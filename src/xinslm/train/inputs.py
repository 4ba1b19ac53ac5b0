"""What a training run starts from: its dataset (prepared on the way from raw text), and the
student's shape.
"""

import dataclasses
from typing import Any

from xinslm.data import prepare, train_tokenizer
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import Dataset, open_dataset
from xinslm.errors import UsageError
from xinslm.files import MANIFEST
from xinslm.model.config import PRESETS, ModelConfig
from xinslm.progress import Listener
from xinslm.tokenizer.config import TokenizerConfig
from xinslm.train.config import PretrainConfig

VOCAB_SIZE = 8192
"""Of a tokenizer that is trained on the way."""


def find_dataset(config: PretrainConfig, on_progress: Listener) -> Dataset:
    """Open the dataset folder, or make one inside the run folder from raw text, with its own
    tokenizer if none is given.
    """
    path = config.data_path
    if (path / MANIFEST).is_file():
        for name in ("tokenizer_path", "vocab_size"):
            if getattr(config, name) is not None:
                raise UsageError(
                    f"{path} is a prepared dataset and has its tokenizer; {name} is "
                    "for raw text. Drop it"
                )
        return open_dataset(path)
    if reason := config.prepared_only():
        raise UsageError(f"{path} is not a dataset folder; {reason}")
    prepared, tokenizer = config.output_dir / "data", config.text_tokenizer()
    if (prepared / MANIFEST).is_file():
        return open_dataset(prepared)
    if tokenizer is None:
        tokenizer = config.output_dir / "tokenizer"
        if not (tokenizer / MANIFEST).is_file():
            vocab_size = VOCAB_SIZE if config.vocab_size is None else config.vocab_size
            train_tokenizer.run(
                TokenizerConfig(
                    data_path=(str(path),), output_dir=tokenizer, vocab_size=vocab_size
                ),
                on_progress,
            )
    prepare.run(
        PrepareConfig(data_path=(str(path),), tokenizer_path=tokenizer, output_dir=prepared),
        on_progress,
    )
    return open_dataset(prepared)


def shape(config: PretrainConfig, tokenizer: Any) -> ModelConfig:
    """The student's shape: the preset, changed by the single sizes given, with the tokenizer's
    vocabulary.
    """
    preset = PRESETS[config.preset]
    heads = preset.num_attention_heads if config.num_heads is None else config.num_heads
    kv_heads = config.num_kv_heads
    if kv_heads is None:
        shared = preset.num_attention_heads // preset.num_key_value_heads
        kv_heads = heads // shared if heads % shared == 0 else heads
    given = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": config.head_dim,
    }
    sizes = {**dataclasses.asdict(preset), **{k: v for k, v in given.items() if v is not None}}
    if config.head_dim is None and not (config.hidden_size is None and config.num_heads is None):
        sizes["head_dim"] = sizes["hidden_size"] // heads
    result = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        **sizes,
        max_position_embeddings=config.max_seq_length,
        tie_word_embeddings=config.tie_word_embeddings,
        sliding_window=config.sliding_window,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    result.check()
    return result
