"""Settings of `xinslm tokenizer train` and `xinslm tokenizer show`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import Range, Settings, range_errors

_TRAIN = {"vocab_size": Range(1), "min_frequency": Range(0), "max_token_length": Range(2)}
_SHOW = {"num_pieces": Range(0)}


@dataclass(frozen=True)
class TokenizerConfig(Settings):
    """Learn a byte-level BPE tokenizer from text, or cut a nested one out of a teacher's."""

    output_dir: Annotated[Path, Alias("-o")]
    """Folder to write the tokenizer to."""
    data_path: tuple[str, ...] = ()
    """Files (.txt .json .jsonl .parquet, also .gz), folders of them, Hugging Face datasets
    (OWNER/NAME).
    """
    vocab_size: int = 30_000
    """Number of ids in all, special tokens included."""
    min_frequency: int = 0
    """Least number of times that a pair must occur in the text to be merged; 0 is no limit."""
    max_token_length: int | None = None
    """Longest token in bytes; 16 to 32 keeps long runs of spaces out of the vocabulary."""
    special_tokens: tuple[str, ...] | None = None
    """Control tokens; the first ends texts, the last pads. Left out: <|endoftext|> <|im_start|>
    <|im_end|> <|pad|>, or the teacher's."""
    prefix_of: Path | None = None
    """Take the first merges of this tokenizer (its folder, any model, or a Hub name)."""
    force: bool = False
    """Replace the output folder if it already holds something."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _TRAIN)
        if self.prefix_of is None and not self.data_path:
            wrong.append(
                "no text to learn from: give --data-path, or --prefix-of TOKENIZER for a nested "
                "tokenizer"
            )
        if self.prefix_of is not None:
            wrong += [
                f"--{name.replace('_', '-')} has no effect with --prefix-of: the merges are the "
                "teacher's. Leave it out"
                for name in ("min_frequency", "max_token_length")
                if getattr(self, name) != getattr(TokenizerConfig, name)
            ]
        return wrong


@dataclass(frozen=True)
class ShowConfig(Settings):
    """Show how a text is cut into tokens, and by which merges."""

    text: Annotated[str, POSITIONAL]
    """The text."""
    tokenizer_path: Path | None = None
    """Its folder, any model (also a GGUF file), or a Hub name; without one, it is learned from the
    text.
    """
    num_pieces: int = 8
    """How many different pieces of the text have their merges shown."""
    allow_special: bool = False
    """Read control tokens in the text as such, not as ordinary text."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _SHOW)
        if not self.text:
            wrong.append("there is no text to show: it is empty")
        return wrong
