"""The stage `tokenizer show`: the tokens of a text, and the merges of each piece.

    xinslm tokenizer show "Once upon a time" --tokenizer-path runs/tokenizer

`run` returns the data, `describe()` plain text, `render()` the same in color for a terminal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xinslm.progress import Listener, ignore
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.config import ShowConfig
from xinslm.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from rich.text import Text

_COLORS = [f"black on {color}" for color in ("cyan", "yellow", "green", "magenta", "white")]
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
_SELF_TAUGHT_IDS = 1_024


@dataclass(frozen=True)
class MergeStep:
    """One merge: its rank, the two parts, and all tokens of the piece after it."""

    rank: int
    left: bytes
    right: bytes
    tokens: tuple[bytes, ...]


@dataclass(frozen=True)
class PieceMerges:
    """A piece of the text and the merges that produced its tokens."""

    piece: str
    steps: tuple[MergeStep, ...]
    is_one_token: bool
    """Whether the piece is one token in the vocabulary, although its merges end in several."""


@dataclass(frozen=True)
class ShowResult:
    """Tokens of a text, with their ids and bytes, and the merges of its first pieces."""

    source: str
    vocab_size: int
    num_bytes: int
    ids: tuple[int, ...]
    tokens: tuple[bytes, ...]
    pieces: tuple[PieceMerges, ...]

    def describe(self) -> str:
        """Return tokens and merges as plain text."""
        return str(_layout(self, lambda token, _: f"[{token}]"))

    @property
    def headline(self) -> str:
        """Return the number of tokens in one line."""
        ratio = self.num_bytes / max(len(self.ids), 1)
        return (
            f"{len(self.ids):,} tokens for {self.num_bytes:,} bytes ({ratio:.2f} bytes per token); "
            f"{self.source}, {self.vocab_size:,} ids"
        )


def run(config: ShowConfig, on_progress: Listener = ignore) -> ShowResult:
    """Encode the text and follow the merges of its first different pieces."""
    config.check()
    tokenizer: Tokenizer
    if config.tokenizer_path is None:
        tokenizer = BPETokenizer(vocab_size=_SELF_TAUGHT_IDS, min_frequency=2)
        tokenizer.train([config.text], on_progress)
        source = "trained on this text"
    else:
        tokenizer = load_tokenizer(config.tokenizer_path)
        source = str(config.tokenizer_path)
    ids = tokenizer.encode(config.text, allowed_special=config.allow_special)
    pieces: list[PieceMerges] = []
    if isinstance(tokenizer, BPETokenizer):
        different = dict.fromkeys(p for p in tokenizer.pieces(config.text) if len(p.encode()) > 1)
        pieces = [_follow(tokenizer, piece) for piece in list(different)[: config.num_pieces]]
    return ShowResult(
        source=source,
        vocab_size=tokenizer.vocab_size,
        num_bytes=len(config.text.encode("utf-8", "replace")),
        ids=tuple(ids),
        tokens=tuple(tokenizer.token_bytes(token) for token in ids),
        pieces=tuple(pieces),
    )


def _follow(tokenizer: BPETokenizer, piece: str) -> PieceMerges:
    data = piece.encode("utf-8", "replace")
    symbols, merges = tokenizer.merge_steps(data)
    tokens = [tokenizer.token_bytes(symbol) for symbol in symbols]
    steps = []
    for rank, at in merges:
        left, right = tokens[at], tokens[at + 1]
        tokens[at : at + 2] = [left + right]
        steps.append(MergeStep(rank, left, right, tuple(tokens)))
    is_one_token = len(tokens) > 1 and len(tokenizer.encode_piece(data)) == 1
    return PieceMerges(piece, tuple(steps), is_one_token)


def visible(token: bytes) -> str:
    """Return a token with visible characters: spaces as dots, what is not text as hexadecimal."""
    text = token.decode("utf-8", "backslashreplace").translate(_VISIBLE)
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def render(result: ShowResult) -> "Text":
    """Return tokens and merges in color: adjacent tokens have different backgrounds."""
    return _layout(result, lambda token, index: (token, _COLORS[index % len(_COLORS)]))


def _layout(result: ShowResult, mark: Callable[[str, int], str | tuple[str, str]]) -> "Text":
    from rich.text import Text

    def row(tokens: tuple[bytes, ...]) -> list[str | tuple[str, str]]:
        return [mark(visible(token), index) for index, token in enumerate(tokens)]

    lines = [
        Text.assemble(*row(result.tokens)),
        Text(" ".join(map(str, result.ids))),
        Text(result.headline),
    ]
    for piece in result.pieces:
        note = "  (one token: the piece is in the vocabulary)" if piece.is_one_token else ""
        lines += [Text(), Text(visible(piece.piece.encode("utf-8", "replace")) + note)]
        for step in piece.steps:
            merge = f"  {step.rank:>7,}  {visible(step.left)} + {visible(step.right)}"
            lines.append(Text.assemble(merge.ljust(34), "  ", *row(step.tokens)))
        if not piece.steps:
            lines.append(Text("  no merges"))
    return Text("\n").join(lines)
