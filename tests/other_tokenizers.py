"""Small tokenizers of kinds that differ: byte-level BPE, sentencepiece-like with byte fallback,
characters with an unknown token; and a dataset and a teacher with one of them."""

import functools
import json

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.demo.stories import stories
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.hf import HFTokenizer
from xinslm.tokenizer.start import start_processor

_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}


@functools.cache
def texts() -> tuple[str, ...]:
    return tuple(stories(30_000, seed=3))


@functools.cache
def byte_level(vocab_size: int, split: str = "llama-bpe", seed: int = 3) -> BPETokenizer:
    made = BPETokenizer(vocab_size=vocab_size, split=split)
    made.train(stories(30_000, seed=seed))
    return made


@functools.cache
def metaspace(
    vocab_size: int, byte_fallback: bool = True, dummy_prefix: bool = True
) -> HFTokenizer:
    """Pieces with a metaspace; without byte fallback, what is not in the vocabulary is one unknown
    token.
    """
    trained = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"])
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts(), trainer)
    content = json.loads(trained.to_str()) | {"pre_tokenizer": None}
    vocab = content["model"]["vocab"]
    if byte_fallback:
        vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space] if dummy_prefix else [space]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dummy_prefix else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
    }
    content["model"]["byte_fallback"] = byte_fallback
    content["post_processor"] = start_processor("<s>", content["model"]["vocab"]["<s>"])
    return HFTokenizer(content, _NAMES, None, "made")


def characters() -> HFTokenizer:
    """One token a character."""
    return metaspace(1, byte_fallback=False)


KINDS = {
    "byte-level": lambda: byte_level(400),
    "byte-level gpt-2": lambda: byte_level(330, "gpt-2", 5),
    "sentencepiece": lambda: metaspace(300),
    "sentencepiece without dummy": lambda: metaspace(250, dummy_prefix=False),
    "characters": characters,
}


def cache_of_another_tokenizer(world, folder, alignment):
    """The world's text in sentencepiece-like tokens, cached from its teacher: data, cache, result,
    settings.
    """
    metaspace(300).save(folder / "tokenizer")
    data = folder / "data"
    prepare.run(
        PrepareConfig(
            data_path=(str(world.text),), tokenizer_path=folder / "tokenizer", output_dir=data
        )
    )
    config = CacheConfig(
        str(world.teacher),
        data,
        folder / "cache",
        max_seq_length=64,
        shard_positions=3000,
        batch_tokens=512,
        device="cpu",
        alignment=alignment,
    )
    return data, folder / "cache", score.run(config), config
