"""Small random T5 encoders on disk, with a real sentencepiece tokenizer, in both layouts that
exist.
"""

import io
from pathlib import Path

import sentencepiece
import torch
import transformers

from small_models import TEXT

CONFIGS = {
    "t5": (transformers.T5Config, transformers.T5EncoderModel),
    "mt5": (transformers.MT5Config, transformers.MT5EncoderModel),
    "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
}


def save_unigram(folder: Path, text: str = TEXT, vocab_size: int = 180) -> None:
    """Train a sentencepiece unigram model, whose normaliser is NFKC, and save it as T5's
    tokenizer.json.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text.split("\n") if line.strip()] * 5),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    fast = transformers.T5TokenizerFast.from_pretrained(folder)
    (folder / "spiece.model").unlink()
    fast.save_pretrained(folder)


def save_encoder(
    folder: Path, diffusers: bool = False, kind: str = "t5", text: str = TEXT, **changes: object
) -> Path:
    """A random encoder of 3 blocks, 24 wide, with dropout 0.1; the folder to give as teacher."""
    config, model = CONFIGS[kind]
    torch.manual_seed(0)
    settings = {
        "vocab_size": 400,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 3,
        "num_heads": 3,
        **changes,
    }
    part = folder / "text_encoder_2" if diffusers else folder
    model(config(**settings)).save_pretrained(part)
    save_unigram(folder / "tokenizer_2" if diffusers else folder, text)
    if diffusers:
        (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model"}')
    return folder
