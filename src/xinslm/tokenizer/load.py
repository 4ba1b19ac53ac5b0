"""Loads any tokenizer: `BPETokenizer` if it is a byte-level BPE with a known split rule, else
`HFTokenizer`.

A name is a folder with a tokenizer (also a model's), a tokenizer.json, a sentencepiece .model, a
GGUF file, a run folder (its best checkpoint), or a Hub name, of which only the tokenizer's files
are downloaded.
"""

from pathlib import Path

from xinslm.gguf_file import is_gguf, open_gguf
from xinslm.places import find
from xinslm.tokenizer import files
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.bpe import BPETokenizer

_HUB_FILES = [
    files.TOKENIZER,
    files.CONFIG,
    files.TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
]


def load_tokenizer(name: Path | str) -> Tokenizer:
    """Load the tokenizer that `name` refers to; no other code asks what kind it is."""
    path = Path(name)
    if is_gguf(path):
        from xinslm.tokenizer.gguf import read_tokenizer

        return read_tokenizer(open_gguf(path).keys, str(path))
    path = find(name, "tokenizer", _holds_tokenizer, _HUB_FILES)
    if not _is_sentencepiece(path):
        try:
            return BPETokenizer.load(path)
        except files.UnsupportedTokenizerError:
            pass
    from xinslm.tokenizer.hf import HFTokenizer

    return HFTokenizer.load(path)


def _holds_tokenizer(path: Path) -> bool:
    if not path.is_dir():
        return path.is_file()
    return any((path / name).is_file() for name in (files.TOKENIZER, "vocab.json")) or any(
        path.glob("*.model")
    )


def _is_sentencepiece(path: Path) -> bool:
    if path.is_dir():
        has_others = (path / files.TOKENIZER).is_file() or (path / "vocab.json").is_file()
        return not has_others and any(path.glob("*.model"))
    return path.suffix == ".model"
