"""A Hugging Face tokenizer as the `tokenizer.ggml.*` keys of a GGUF file.

Two engines of llama.cpp are used: "gpt2", byte-level BPE with a split rule that it knows by name,
and "llama", sentencepiece, which merges by the score of the resulting piece; scores are computed
from merge ranks. A tokenizer that either engine would apply differently is refused or noted.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFWriter, TokenType

from xinslm.errors import XinslmError
from xinslm.files import read_json
from xinslm.model.config import ModelConfig
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.load import load_tokenizer

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_IGNORES_MERGES = {"llama-bpe": True, "gpt-2": False, "qwen2": False, "smollm": False}
"""Split rules by llama.cpp's name: whether a word that is in the vocabulary skips the merges."""


@dataclass(frozen=True)
class Vocabulary:
    """Content of the tokenizer keys of a GGUF file."""

    model: str
    """'gpt2' (byte-level BPE) or 'llama' (sentencepiece BPE with byte fallback)."""
    pre: str
    """Name of the split rule."""
    tokens: list[str]
    """One per row of the embedding."""
    types: list[TokenType]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    """Ids by role: bos, eos, unk, pad."""
    add_bos: bool
    """Whether the tokenizer adds BOS before a text."""
    add_space_prefix: bool
    chat_template: str | None
    notes: tuple[str, ...]
    """Differences in llama.cpp."""

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys to a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        setters = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }
        for role, token in self.special.items():
            setters[role](token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, config: ModelConfig) -> Vocabulary:
    """Read a model folder's tokenizer; XinslmError if llama.cpp has no engine for it."""
    ours = load_tokenizer(folder)
    spec, path = _specification(ours, folder), folder / "tokenizer.json"
    model = spec["model"]
    pieces = dict(model["vocab"])
    types = {token: TokenType.NORMAL for token in pieces.values()}
    for added in spec.get("added_tokens", []):
        pieces[added["content"]] = added["id"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    tokens = _rows(pieces, types, config.vocab_size, path)
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    bos = config.bos_token_id if ours.bos_id is None else ours.bos_id
    roles = {
        "bos": ours.start_ids[0] if ours.start_ids else bos,
        "eos": config.eos_token_id if ours.eos_id is None else ours.eos_id,
        "unk": pieces.get(model.get("unk_token")),
        "pad": config.pad_token_id if ours.pad_id is None else ours.pad_id,
    }
    special = {role: token for role, token in roles.items() if token is not None}
    split = getattr(ours, "split_name", None)
    if model.get("byte_fallback"):
        engine, pre, add_space_prefix = "llama", "default", _space_prefix(spec, path)
        if "unk" in special:
            types[special["unk"]] = TokenType.UNKNOWN
        notes = _sentencepiece_notes(tokens, merges)
    elif split in _IGNORES_MERGES:
        engine, pre, add_space_prefix = "gpt2", split, False
        notes = _byte_level_notes(spec, tokens, types, merges, pre)
    else:
        raise XinslmError(
            f"{path}: neither sentencepiece BPE with byte fallback nor byte-level BPE with a rule "
            "for splitting that "
            f"is known here ({', '.join(_IGNORES_MERGES)}); llama.cpp would cut texts differently"
        )
    return Vocabulary(
        model=engine,
        pre=pre,
        tokens=tokens,
        scores=_scores(tokens, types, merges) if engine == "llama" else None,
        types=[types[token] for token in range(len(tokens))],
        merges=[" ".join(merge) for merge in merges] if engine == "gpt2" else None,
        special=special,
        add_bos=bool(ours.start_ids),
        add_space_prefix=add_space_prefix,
        chat_template=ours.chat_template,
        notes=(*notes, *_start_notes(ours)),
    )


def _start_notes(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Note different starts: llama.cpp adds one token, BOS, before texts and chats alike."""
    start = tokenizer.start_ids
    if len(start) > 1:
        return (f"the tokenizer begins a text with the ids {start}; llama.cpp puts only the first",)
    if not start or tokenizer.chat_template is None:
        return ()
    try:
        ids, _ = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    except XinslmError:  # the template needs other messages
        return ()
    if ids[:1] == start:
        return ()
    return ("the chat template does not begin with BOS, but llama.cpp begins chats with it",)


def _specification(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Content of tokenizer.json, converted if the folder has other files."""
    if not (folder / "tokenizer.json").is_file():
        with TemporaryDirectory() as made:
            tokenizer.save(Path(made))
            return _specification(tokenizer, Path(made))
    spec: dict[str, Any] = read_json(folder / "tokenizer.json")
    if spec["model"].get("type", "BPE") != "BPE":
        raise XinslmError(
            f"{folder}: a {spec['model']['type']} tokenizer; GGUF export knows BPE only"
        )
    return spec


def _rows(
    pieces: dict[str, int], types: dict[int, TokenType], num_rows: int, path: Path
) -> list[str]:
    """Pieces by id, as many as the embedding has rows; rows without a piece become UNUSED."""
    by_id = {token: piece for piece, token in pieces.items()}
    if max(by_id) >= num_rows:
        raise XinslmError(
            f"{path} has token id {max(by_id)}, but the model's embedding only {num_rows} rows"
        )
    for missing in set(range(num_rows)) - by_id.keys():
        by_id[missing], types[missing] = f"[PAD{missing}]", TokenType.UNUSED
    return [by_id[token] for token in range(num_rows)]


def _scores(
    tokens: list[str], types: dict[int, TokenType], merges: list[tuple[str, ...]]
) -> list[float]:
    """Sentencepiece scores: minus the rank of a piece's first merge, all other pieces below; marks
    byte pieces in `types`.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = []
    for token, piece in enumerate(tokens):
        if _BYTE.fullmatch(piece):
            types[token] = TokenType.BYTE
        plain = types[token] == TokenType.NORMAL
        scores.append(-float(ranks.get(piece, len(merges) + token)) if plain else 0.0)
    return scores


def _sentencepiece_notes(tokens: list[str], merges: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Note pairs that llama.cpp merges, because the merged piece has a score, but tokenizer.json
    does not.
    """
    known, listed = set(tokens), set(merges)
    hidden = [
        piece
        for piece in dict.fromkeys(left + right for left, right in merges)
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known and (piece[:at], piece[at:]) not in listed
    ]
    if not hidden:
        return ()
    return (
        f"{len(hidden)} pairs of pieces join by sentencepiece's rule but not by the merges (the "
        "first makes "
        f"'{hidden[0]}'); llama.cpp follows sentencepiece, so rare words may split otherwise",
    )


def _space_prefix(spec: dict[str, Any], path: Path) -> bool:
    """Whether a space is added before each text; XinslmError for normalisation beyond spaces."""
    found: list[dict[str, Any]] = []
    for step in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        if step is not None:
            found += step.get("normalizers") or step.get("pretokenizers") or [step]
    prefix = False
    for step in found:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif (
            step["type"] == "Metaspace"
            and step["replacement"] == "▁"
            and not step.get("split", True)
        ):
            prefix |= step.get("prepend_scheme", "always") != "never"
        elif not (
            step["type"] == "Replace"
            and step["content"] == "▁"
            and step["pattern"] == {"String": " "}
        ):
            raise XinslmError(
                f"{path}: its step '{step['type']}' has no counterpart in llama.cpp's "
                "sentencepiece engine"
            )
    return prefix


def _byte_level_notes(
    spec: dict[str, Any],
    tokens: list[str],
    types: dict[int, TokenType],
    merges: list[tuple[str, ...]],
    pre: str,
) -> tuple[str, ...]:
    """Note differences: llama.cpp never normalises, and its split rule decides if words skip the
    merges.
    """
    notes: tuple[str, ...] = ()
    if spec.get("normalizer"):
        notes = (
            "the tokenizer normalizes Unicode (NFC) first, llama.cpp does not: decomposed "
            "accents differ",
        )
    if bool(spec["model"].get("ignore_merges")) == _IGNORES_MERGES[pre]:
        return notes
    made = {left + right for left, right in merges}
    odd = [
        piece
        for token, piece in enumerate(tokens)
        if types[token] == TokenType.NORMAL and len(piece) > 1 and piece not in made
    ]
    if odd:
        notes += (
            f"{len(odd)} pieces (the first is '{odd[0]}') come out of no merge; llama.cpp "
            "may differ there",
        )
    return notes
