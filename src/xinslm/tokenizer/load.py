"""Opening a tokenizer of any kind: ours where it is a byte-level BPE that we know, else the Hugging Face one."""

from pathlib import Path

from xinslm.errors import UsageError
from xinslm.tokenizer import files
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.bpe import BPETokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from a folder (of a model, too), a tokenizer.json, or a sentencepiece .model file."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; a tokenizer is a folder with a tokenizer.json, or a .model file")
    if not _is_sentencepiece(path):
        try:
            return BPETokenizer.load(path)
        except files.UnsupportedTokenizerError:
            pass
    from xinslm.tokenizer.hf import HFTokenizer

    return HFTokenizer.load(path)


def _is_sentencepiece(path: Path) -> bool:
    if path.is_dir():
        has_others = (path / files.TOKENIZER).is_file() or (path / "vocab.json").is_file()
        return not has_others and any(path.glob("*.model"))
    return path.suffix == ".model"
