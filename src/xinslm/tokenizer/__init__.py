"""Tokenizers: our own byte-level BPE, any Hugging Face tokenizer with the same interface, and
nested vocabularies.

Names are imported on first use, so that the command line can import `config.py` alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xinslm.tokenizer.base import StreamDecoder, Tokenizer
    from xinslm.tokenizer.bpe import BPETokenizer
    from xinslm.tokenizer.load import load_tokenizer
    from xinslm.tokenizer.nested import prefix_pieces

__all__ = ["BPETokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer", "prefix_pieces"]

_MODULES = {
    "BPETokenizer": "bpe",
    "StreamDecoder": "base",
    "Tokenizer": "base",
    "load_tokenizer": "load",
    "prefix_pieces": "nested",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'xinslm.tokenizer' has no attribute '{name}'")
    return getattr(import_module(f"xinslm.tokenizer.{_MODULES[name]}"), name)
