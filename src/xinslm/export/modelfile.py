"""The Modelfile of a GGUF file: `ollama create NAME -f Modelfile` makes a model of it.

TEMPLATE gives the text of the model's own chat template (`ollama_template.py`), tools included
where their form is known; where that cannot be had, it is left out and the reason is a comment.
Sampling comes from generation_config.json. Ollama's reader drops characters that are not printable,
so none is written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm import __version__
from xinslm.errors import UsageError
from xinslm.export.chat_pieces import UnknownTemplateError
from xinslm.export.ollama_template import OllamaTemplate, make_template
from xinslm.files import read_json
from xinslm.model.config import ModelConfig
from xinslm.model.source import GENERATION, ModelSource
from xinslm.tokenizer.base import Tokenizer

MODELFILE = "Modelfile"
MARK = "written by xinslm"
"""What the first line of our Modelfiles says; --force replaces no others."""
MAX_CACHE_BYTES = 2 * 2**30
"""Largest key-value cache, in float16, that `num_ctx` asks for: Ollama reserves it at once."""
MIN_CONTEXT = 4096
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Names in generation_config.json, and Ollama's."""


@dataclass(frozen=True)
class Modelfile:
    """Content of a Modelfile."""

    text: str
    has_template: bool
    notes: tuple[str, ...]


def require_writable(path: Path, force: bool) -> None:
    """Raise UsageError if there is a Modelfile that must not be replaced."""
    if not path.exists():
        return
    ours = path.is_file() and MARK in path.read_text("utf-8", "replace").partition("\n")[0]
    if not ours:
        raise UsageError(f"{path} exists and is not xinslm's. Move it, or write to another folder")
    if not force:
        raise UsageError(f"{path} exists. Write to another folder, or add --force to replace it")


def make_modelfile(
    file: Path, source: ModelSource, tokenizer: Tokenizer, context: int, adds_bos: bool
) -> Modelfile:
    """Compose the Modelfile of the GGUF `file`, which lies next to it.

    `context` is the file's context length; `adds_bos`, whether llama.cpp begins texts with BOS.
    """
    if not file.name.isprintable():
        raise UsageError(f"Ollama cannot read the file name {file.name!r}: choose another one")
    template, notes = _template(tokenizer, adds_bos)
    length, about = _num_ctx(source.config, context)
    lines = [f"# Modelfile of {file.name}, {MARK} {__version__}: ollama create NAME -f {MODELFILE}"]
    lines += [f"# {note}" for note in (*notes, *about)]
    lines.append(f"FROM ./{file.name}")
    if template is not None:
        lines.append(f'TEMPLATE """{template.text}"""')
        system = template.pieces.default_system
        if system is not None and _is_readable(system):
            lines.append(f"SYSTEM {_quoted(system)}")
    lines.append(f"PARAMETER num_ctx {length}")
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(source.path)]
    lines += [f"PARAMETER stop {_quoted(word)}" for word in _stop_words(template, tokenizer)]
    return Modelfile("\n".join(lines) + "\n", template is not None, (*notes, *about))


def _template(
    tokenizer: Tokenizer, adds_bos: bool
) -> tuple[OllamaTemplate | None, tuple[str, ...]]:
    if tokenizer.chat_template is None:
        return None, ("the model has no chat template, so the Modelfile has no TEMPLATE",)
    try:
        template = make_template(tokenizer, adds_bos)
    except UnknownTemplateError as error:
        return None, (
            f"no TEMPLATE: the chat template has no form in Ollama's language ({error}). Ollama "
            "takes the GGUF's chat template where it can",
        )
    notes = template.notes
    if template.has_tools:
        notes += (
            "TEMPLATE writes a tool's keys in the order type, function: name, description, "
            "parameters (type, properties, required); models get other tokens than their chat "
            "template's if a tool is given there in another order",
        )
    return template, notes


def _num_ctx(model: ModelConfig, context: int) -> tuple[int, tuple[str, ...]]:
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2
    most = max(MIN_CONTEXT, MAX_CACHE_BYTES // per_token // 1024 * 1024)
    if context <= most:
        return context, ()
    return most, (
        f"num_ctx is {most:,} of the model's {context:,} tokens: Ollama reserves "
        f"{per_token * most / 2**30:.1f} GiB for them at once",
    )


def _sampling(folder: Path) -> Iterator[tuple[str, Any]]:
    """Ollama's names and values of what generation_config.json says."""
    path = folder / GENERATION
    settings = read_json(path) if folder.is_dir() and path.is_file() else {}
    if not isinstance(settings, Mapping):
        return
    if settings.get("do_sample") is False:
        yield "temperature", 0
    for theirs, name in _PARAMETERS.items():
        value = settings.get(theirs)
        if theirs == "temperature" and settings.get("do_sample") is False:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _stop_words(template: OllamaTemplate | None, tokenizer: Tokenizer) -> list[str]:
    """The end token, and the control tokens around messages; where there are none, their marks."""
    words = dict.fromkeys(filter(None, [tokenizer.named_tokens.get("eos_token")]))
    if template is None:
        return [word for word in words if word.isprintable()]
    pieces = template.pieces
    texts = [*pieces.after.values(), *pieces.prompt.values()]
    for by_last in pieces.before.values():
        # the first message's text has BOS and a default system message, too
        texts += [text for last, text in by_last.items() if last] or by_last.values()
    for text in texts:
        tokens = [token for token in tokenizer.special_tokens if token in text]
        mark = text.strip().partition("\n")[0].strip()
        if not tokens and len(mark) > 2 and not mark[0].isalnum():
            tokens = [mark]
        words |= dict.fromkeys(sorted(tokens, key=text.find))
    return [word for word in words if word.isprintable()]


def _is_readable(text: str) -> bool:
    """Whether Ollama reads a text in a Modelfile as it is."""
    return text.replace("\n", "").isprintable() and '"""' not in text


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
