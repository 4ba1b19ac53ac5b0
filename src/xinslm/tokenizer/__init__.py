"""Tokenizers: our own byte-level BPE, any Hugging Face tokenizer behind the same interface, nested
vocabularies.

Names are loaded when they are used, so that the command line can read `config.py` alone.
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
