"""Reads and writes the files of a byte-level BPE: tokenizer.json, tokenizer_config.json and
chat_template.jinja.

`read` accepts exactly what this package encodes like Hugging Face, and names the reason when it
refuses a file. tokenizer_config.json contains `PreTrainedTokenizerFast`, the class name that every
version of transformers and swift-transformers supports. `ignore_merges` is true for the LLaMA-3
split because llama.cpp sets it for `pre = llama-bpe`; the ids of a learned vocabulary do not depend
on it (see learn.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from xinslm.errors import XinslmError
from xinslm.files import read_json, write_json, write_text
from xinslm.tokenizer.alphabet import ALPHABET, SPLITS
from xinslm.tokenizer.start import start_ids, start_processor

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_DIGITS = {"type": "Digits", "individual_digits": True}
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class UnsupportedTokenizerError(XinslmError):
    """The file is valid, but not a byte-level BPE with a known split rule."""


@dataclass(frozen=True)
class Outline:
    """What a byte-level BPE is, but for its vocabulary and merges."""

    vocab_size: int
    special_tokens: dict[str, int]
    added_tokens: dict[str, int]
    split: str
    named_tokens: dict[str, str]
    roles: list[int | None]
    """Ids of BOS, EOS and pad."""
    start_ids: list[int]
    chat_template: str | None
    normalizer: Literal["NFC"] | None


@dataclass(frozen=True)
class Definition:
    """The content of a byte-level BPE's files."""

    vocab: dict[str, int]
    """Tokens in the byte alphabet, to ids; special tokens only if the file has them here."""
    merges: list[tuple[str, str]]
    special_tokens: dict[str, int]
    added_tokens: dict[str, int]
    """Tokens that any text is searched for before it is split, and that are not control tokens."""
    split: str
    ignore_merges: bool
    named_tokens: dict[str, str]
    """'bos_token', 'eos_token', 'pad_token', 'unk_token': their contents."""
    chat_template: str | None = None
    normalizer: Literal["NFC"] | None = None
    post_processor: dict[str, Any] | None = None
    """Adds tokens around a text, for example BOS; `encode` does not apply it."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further entries of tokenizer_config.json that are kept: model_max_length."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, unused ones included."""
        return 1 + max((self.vocab | self.special_tokens | self.added_tokens).values())

    @property
    def start_ids(self) -> list[int]:
        """Return the ids that are prepended to a text."""
        return start_ids(self.post_processor, self.vocab_size)

    def roles(self) -> list[int | None]:
        """Return the ids of BOS, EOS and pad."""
        ids = self.vocab | self.added_tokens | self.special_tokens
        return [ids.get(self.named_tokens.get(name, "")) for name in NAMES[:3]]

    def outline(self) -> Outline:
        """Return what can be said without vocabulary and merges."""
        return Outline(
            self.vocab_size,
            self.special_tokens,
            self.added_tokens,
            self.split,
            self.named_tokens,
            self.roles(),
            self.start_ids,
            self.chat_template,
            self.normalizer,
        )


def new_definition(
    tokens: list[str], merges: list[tuple[str, str]], special: list[str], split: str
) -> Definition:
    """Define a new vocabulary: `tokens` in id order, then `special`, whose first is BOS and EOS."""
    return Definition(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        special_tokens={content: len(tokens) + index for index, content in enumerate(special)},
        added_tokens={},
        split=split,
        ignore_merges=split == "llama-bpe",
        named_tokens=default_names(special),
        chat_template=default_template(special),
        post_processor=start_processor(special[0], len(tokens)) if special else None,
    )


def default_names(special: list[str]) -> dict[str, str]:
    """Return the roles of new special tokens: the first begins and ends texts, the last pads."""
    if not special:
        return {}
    return {"bos_token": special[0], "eos_token": special[0], "pad_token": special[-1]}


def default_template(special: list[str]) -> str | None:
    """Return ChatML if the special tokens allow it."""
    if not {"<|im_start|>", "<|im_end|>"} <= set(special):
        return None
    from xinslm.tokenizer.chat import CHATML, with_start  # Jinja is slow to import

    return with_start(CHATML, default_names(special))


def write(definition: Definition, folder: Path) -> None:
    """Write a tokenizer's files into a folder, each atomically."""
    added = [(index, content, True) for content, index in definition.special_tokens.items()]
    added += [(index, content, False) for content, index in definition.added_tokens.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    steps = {
        "normalizer": {"type": definition.normalizer} if definition.normalizer else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": _pre_tokenizers(definition.split, byte_level),
        },
        "post_processor": definition.post_processor,
        "decoder": byte_level,
    }
    model = {"ignore_merges": definition.ignore_merges, "vocab": definition.vocab}
    content = tokenizer_json(added, steps, model | {"merges": definition.merges})
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write_text(folder / TOKENIZER, text + "\n")
    write_config(folder, definition.named_tokens, definition.chat_template, definition.config)


def tokenizer_json(
    added: list[tuple[int, str, bool]], steps: dict[str, Any], model: dict[str, Any]
) -> dict[str, Any]:
    """Return a BPE's tokenizer.json; `added`: id, content, and whether it is a control token."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": content, **plain, "special": special}
            for index, content, special in sorted(added)
        ],
        **steps,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
        },
    }


def _pre_tokenizers(split: str, byte_level: dict[str, Any]) -> list[dict[str, Any]]:
    if split == "smollm":  # as its authors write it
        return [_DIGITS, {**byte_level, "use_regex": True}]
    rule = {"Regex": SPLITS[split].pattern}
    return [
        {"type": "Split", "pattern": rule, "behavior": "Isolated", "invert": False},
        byte_level,
    ]


def write_config(
    folder: Path, named: dict[str, str], template: str | None, more: Mapping[str, Any]
) -> None:
    """Write tokenizer_config.json and, if there is a template, chat_template.jinja."""
    # transformers' own writer names a class that other programs do not support (TokenizersBackend).
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / CONFIG, {**fixed, **named, **more})
    if template is None:
        (folder / TEMPLATE).unlink(missing_ok=True)
    else:
        write_text(folder / TEMPLATE, template)


def read(path: Path) -> Definition:
    """Read a folder, a tokenizer.json, or a folder with GPT-2's vocab.json and merges.txt."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / TOKENIZER).is_file() and (path / "vocab.json").is_file():
        return _read_gpt2(path)
    file = path / TOKENIZER if path.is_dir() else path
    content = read_tokenizer_json(file)
    try:
        definition = _define(content, file)
    except UnsupportedTokenizerError as error:
        raise UnsupportedTokenizerError(
            f"{file} is not a byte-level BPE that BPETokenizer supports: {error}"
        ) from None
    except XinslmError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise XinslmError(f"{file}: not a valid tokenizer.json ({error!r})") from None
    named, template, more = read_config(folder)
    return replace(definition, named_tokens=named, chat_template=template, config=more)


def read_tokenizer_json(file: Path) -> dict[str, Any]:
    """Read a tokenizer.json; refuse truncation and padding, which would silently change texts."""
    if file.is_file():
        with open(file, "rb") as opened:
            if opened.read(1) == b"\x80":
                raise XinslmError(
                    f"{file} is a pickle, which can run code; xinslm reads tokenizer.json only"
                )
    elif file.parent.is_dir() and file.name == TOKENIZER:
        raise XinslmError(f"{file.parent} contains no tokenizer: it has no {TOKENIZER}")
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise XinslmError(f"{file}: not a tokenizer.json: it has no 'model'")
    for setting in ("truncation", "padding"):
        if content.get(setting) is not None:
            raise XinslmError(
                f'{file}: "{setting}" is set ({json.dumps(content[setting])}); it would silently '
                f'change every encoded text. Set "{setting}" to null in that file'
            )
    return content


def read_config(folder: Path) -> tuple[dict[str, str], str | None, dict[str, Any]]:
    """Read the named tokens, the chat template and the other kept entries of a folder."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise XinslmError(f"{folder / CONFIG}: must be a JSON object")
    named = {}
    for name in NAMES:
        entry = config.get(name)
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str):
            named[name] = content
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry["template"] for entry in template}.get("default")
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_bytes().decode("utf-8", "replace")
    return named, template, {key: config[key] for key in ("model_max_length",) if key in config}


def _read_gpt2(folder: Path) -> Definition:
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
    special = {content: vocab[content] for content in ("<|endoftext|>",) if content in vocab}
    _check_merges(vocab, merges, folder / "merges.txt")
    named, template, more = read_config(folder)
    named = named or {name: content for content in special for name in ("bos_token", "eos_token")}
    return Definition(vocab, merges, special, {}, "gpt-2", False, named, template, config=more)


def _pair(entry: str | list[str]) -> tuple[str, str]:
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    return left, right


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, str]], file: Path) -> None:
    for rank, (left, right) in enumerate(merges):
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise XinslmError(
                f"{file}: merge {rank} ({left!r}, {right!r}) has a token missing in the vocabulary"
            )


def _define(content: dict[str, Any], file: Path) -> Definition:
    model = content["model"]
    _require(model.get("type", "BPE") == "BPE", f"its model is {model.get('type')}, not BPE")
    vocab: dict[str, int] = model["vocab"]
    own = {token: token for token in vocab}  # copies in the merges would take 5 MB of 49,152 ids
    pairs = map(_pair, model["merges"])
    merges = [(own.get(left, left), own.get(right, right)) for left, right in pairs]
    split = _split_name(content.get("pre_tokenizer"))
    _require(split is not None, "it does not split text like LLaMA-3, GPT-2, Qwen2 or SmolLM")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _require(not model.get(key), f"its model has {key}")
    known = model.get("unk_token") is None or all(char in vocab for char in ALPHABET)
    _require(known, "its vocabulary has an unknown token and not all bytes")
    decoder = (content.get("decoder") or {}).get("type")
    _require(decoder == "ByteLevel", "its decoder is not ByteLevel")
    normalizer = content.get("normalizer")
    _require(normalizer in (None, {"type": "NFC"}), "its normalizer is not NFC")
    added = content.get("added_tokens") or []
    following = max(vocab.values()) + 1
    for token in added:
        expected = vocab.get(token["content"], following)
        following += token["content"] not in vocab
        name = f"its token {token['content']!r}"
        _require(token["id"] == expected, f"{name} does not have the id {expected}")
        strips = token.get("single_word") or token.get("lstrip") or token.get("rstrip")
        _require(not strips, f"{name} includes the spaces around it")
    _check_merges(vocab, merges, file)
    definition = Definition(
        vocab=vocab,
        merges=merges,
        special_tokens={token["content"]: token["id"] for token in added if token["special"]},
        added_tokens={token["content"]: token["id"] for token in added if not token["special"]},
        split=str(split),
        ignore_merges=bool(model.get("ignore_merges")),
        named_tokens={},
        normalizer="NFC" if normalizer else None,
        post_processor=content.get("post_processor"),
    )
    _ = definition.start_ids  # so that the error of a bad post-processor names the file
    return definition


def _require(met: bool, reason: str) -> None:
    if not met:
        raise UnsupportedTokenizerError(reason)


def _split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the name of a known split rule from its tokenizer.json form; None for any other."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if len(steps) == 1:
        return "gpt-2" if last.get("use_regex", True) else None
    first = steps[0]
    if len(steps) == 2 and first == _DIGITS and last.get("use_regex", True):
        return "smollm"
    if len(steps) != 2 or first.get("invert") or last.get("use_regex", True):
        return None
    if (first.get("type"), first.get("behavior")) != ("Split", "Isolated"):
        return None
    pattern = first["pattern"].get("Regex")
    return next((split.name for split in SPLITS.values() if split.pattern == pattern), None)
