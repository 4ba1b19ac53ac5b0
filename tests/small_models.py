"""Small models, tokenizers and datasets on disk, made from nothing, for the tests of quantization
and export.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from xinslm.files import write_manifest
from xinslm.model.config import ModelConfig
from xinslm.model.files import save_model
from xinslm.model.transformer import Transformer
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize

torch.set_num_threads(1)  # models this small are slower with more
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim "
    "}}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT = (
    "The quick brown fox doesn't jump over the lazy dog. It's 12345 o'clock, and we've 3.14 "
    "reasons! "
    "Zwölf große Boxkämpfer jagen Viktor. Съешь ещё этих мягких булок. 我们在学习语言模型。 "
    "Numbers: 0 1 22 333 4444 55555.\r\n\r\n\tTabs and   spaces   \n Emoji 😀👩‍👩‍👧"
    " and naïve café.\n"
)
SPECIALS = ["<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]


def save_tokenizer(
    folder: Path, vocab_size: int = 320, template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with LLaMA-3's split rule on `TEXT` and save it the Hugging Face
    way.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = template
    fast.save_pretrained(str(folder))
    return fast


def make_config(**changes: object) -> ModelConfig:
    """GQA with nh != nkv and head_dim != hidden / heads, so that no wrong reshape goes unseen."""
    values: dict = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return ModelConfig(**(values | changes))


FAMILIES = {
    "qwen2": {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": False},
    "qwen3": {"qk_norm": True},
    "llama with biases": {"attention_bias": True, "attention_output_bias": True},
}
"""Changes of `make_config`: families with vectors that LLaMA does not have."""


def save_random_model(
    folder: Path, seed: int = 0, vocabulary: int = 320, **changes: object
) -> Transformer:
    """A random model with weights large enough for peaked distributions, its tokenizer beside
    it.
    """
    config = make_config(**changes)
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                low = -1.0 if name.endswith(".bias") else 0.5
                weight.uniform_(low, 1.5, generator=generator)
            else:
                deviation = (
                    0.3 if "embed" in name or "head" in name else 1.2 / weight.shape[1] ** 0.5
                )
                weight.normal_(0, deviation, generator=generator)
    save_model(model, folder)
    save_tokenizer(folder, vocabulary)
    return model.eval()


QUANTIZED_KINDS = ("tied", "untied", "8-bit", "odd width")


def save_quantized(folder: Path, kind: str) -> None:
    """A random model `full` and its rounded copy `q`; an odd width leaves down_proj plain."""
    width = {"intermediate_size": 80} if kind == "odd width" else {}
    save_random_model(folder / "full", tie_word_embeddings=kind != "untied", **width)
    bits = 8 if kind == "8-bit" else 4
    quantize(QuantizeConfig(folder / "full", folder / "q", method="rtn", bits=bits))


def save_dataset(
    folder: Path, tokenizer: str, vocab_size: int = 320, documents: int = 60, seed: int = 1
) -> Path:
    """A dataset folder as `xinslm prepare` lays it out, its documents skewed random ids of uneven
    lengths.
    """
    rng = np.random.default_rng(seed)
    splits = {}
    for name, count in (("train", documents), ("validation", 5)):
        lengths = rng.integers(5, 90, count)
        tokens = (rng.pareto(0.7, lengths.sum()) * 3).clip(0, vocab_size - 6).astype("<u2") + 5
        split = folder / name
        split.mkdir(parents=True)
        tokens.tofile(split / "tokens.bin")
        np.ones(len(tokens), np.uint8).tofile(split / "mask.bin")
        np.save(split / "documents.npy", np.concatenate([[0], lengths.cumsum()]).astype(np.int64))
        np.save(split / "document_bytes.npy", (4 * lengths).astype(np.int64))
        splits[name] = {"documents": count, "tokens": len(tokens)}
    write_manifest(
        folder,
        "dataset",
        1,
        {},
        {"tokenizer": tokenizer},
        vocab_size=vocab_size,
        dtype="uint16",
        splits=splits,
    )
    return folder


def tree_hash(folder: Path) -> str:
    """Hash of all files of a folder but the manifest, which names where things lay."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
