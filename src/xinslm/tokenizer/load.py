"""Loads any tokenizer: `BPETokenizer` if it is a byte-level BPE with a known split rule, else
`HFTokenizer`.

A path is a folder with a tokenizer (also a model's), a tokenizer.json, a sentencepiece .model, a
run folder (its best checkpoint), or a Hub name, of which only the tokenizer's files are downloaded.
"""

import re
from pathlib import Path

from xinslm.errors import UsageError
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


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from a folder (also of a model or run), a file, or the Hub; see
    `resolve_tokenizer`.
    """
    path = resolve_tokenizer(path)
    if not _is_sentencepiece(path):
        try:
            return BPETokenizer.load(path)
        except files.UnsupportedTokenizerError:
            pass
    from xinslm.tokenizer.hf import HFTokenizer

    return HFTokenizer.load(path)


def resolve_tokenizer(path: Path | str) -> Path:
    """Find the file or folder that `path` refers to; UsageError if neither this machine nor the Hub
    has it.
    """
    folder = Path(path)
    for candidate in (folder, folder / "checkpoints" / "best", folder / "checkpoints" / "last"):
        if _holds_tokenizer(candidate):
            return candidate
    if folder.exists():
        return folder  # the reader names what is missing
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise UsageError(
            f"{path} does not exist; a tokenizer is a folder with a {files.TOKENIZER} (a model's, "
            "or a run folder), a .model file, or a Hub name with its owner, OWNER/NAME, such as "
            "openai-community/gpt2"
        )
    import huggingface_hub

    try:
        downloaded = Path(huggingface_hub.snapshot_download(str(path), allow_patterns=_HUB_FILES))
    # the hub client raises a dozen kinds: offline, no such repository, gated
    except Exception as error:
        raise UsageError(
            f"{path} does not exist here, and the Hub returned no tokenizer of that name: {error}"
        ) from error
    if not _holds_tokenizer(downloaded):
        raise UsageError(
            f"{path} does not exist here, and the Hub repository of that name has no tokenizer"
        )
    return downloaded


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
