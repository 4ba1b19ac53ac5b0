"""A chat template as Ollama's: Go's text/template over `.Messages`, checked before it is used.

The text is made of the pieces that `chat_pieces.py` finds, and executed by `go_template.py` on
conversations that the pieces were not found with. One that differs from the Jinja template's text
refuses the template; a rare one that differs (a system message in the middle) becomes a note.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xinslm.errors import XinslmError
from xinslm.export.chat_pieces import (
    ROLES,
    ChatPieces,
    Message,
    Render,
    UnknownTemplateError,
    conversation,
    derive,
)
from xinslm.export.go_template import GoTemplateError, execute, quote
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.chat import render_chat

_DATE = "\ufdd3"
"""What `strftime_now` gives here: a noncharacter that no text contains."""
_CONTENTS = (
    "Hello, World!",
    "two\n\nlines {{ .Content }} {% if x %} 'single' \"double\" \\ <b>&amp;</b>",
    "  naïve 東京 🙂\t",
    "\u3000\u00a0 wide spaces \u2003\n\n",
    "<think>\nsure?\n</think>\n\nYes.",
    "x",
    '{"name": "f", "arguments": {}}',
)
_USUAL = {"system": "", "user": "assistant", "assistant": "user"}
"""The role before a message of each role whose texts serve where no other was seen."""
_REQUIRED = ("u", "uau", "uauau", "uauauau", "su", "suau", "suauau")
_RARE = {
    "ua": "the last message is the assistant's",
    "sua": "the last message is the assistant's",
    "uasu": "a system message follows an answer",
    "suasu": "a system message follows an answer",
    "au": "the assistant begins",
    "sau": "the assistant begins",
}


@dataclass(frozen=True)
class OllamaTemplate:
    """A template that renders the probes as the Jinja template does."""

    text: str
    pieces: ChatPieces
    notes: tuple[str, ...]


def make_template(tokenizer: Tokenizer, adds_bos: bool) -> OllamaTemplate:
    """Write a tokenizer's chat template as Ollama's; UnknownTemplateError says why it cannot be.

    `adds_bos`: llama.cpp puts BOS in front, so the text begins after it.
    """
    render = _renderer(tokenizer, adds_bos)
    pieces = derive(render)
    text = "".join(_source(pieces))
    rare = _check(text, render, pieces.default_system)
    return OllamaTemplate(text, pieces, (*pieces.notes, *rare))


def collate(messages: Sequence[Message]) -> dict[str, Any]:
    """The data that Ollama executes a template with: neighbours of one role become one message."""
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    system = [message["content"] for message in messages if message["role"] == "system"]
    return {"System": "\n\n".join(system), "Messages": merged}


def _renderer(tokenizer: Tokenizer, adds_bos: bool) -> Render:
    bos = tokenizer.named_tokens.get("bos_token") or ""
    if tokenizer.start_ids:
        ids = {token: text for text, token in tokenizer.special_tokens.items()}
        bos = ids.get(tokenizer.start_ids[0], bos)

    def render(messages: list[Message], prompt: bool) -> str | None:
        try:
            text = render_chat(tokenizer, messages, prompt, strftime_now=lambda pattern: _DATE)
        except XinslmError:
            return None
        if _DATE in text:
            raise UnknownTemplateError("it writes today's date, which Ollama writes otherwise")
        return text.removeprefix(bos) if adds_bos else text

    return render


def _check(text: str, render: Render, default_system: str | None) -> tuple[str, ...]:
    """Compare with the Jinja template; UnknownTemplateError if they differ, notes if rarely."""

    def differs(roles: str, shift: int, empty: int = -1) -> bool:
        messages = conversation(
            roles, lambda i: "" if i == empty else _CONTENTS[(i + shift) % len(_CONTENTS)]
        )
        expected = render(messages, True)
        if expected is None:
            return False
        try:
            if execute(text, collate(messages)) != expected:
                return True
            if default_system is None or "s" in roles:
                return False
            # Ollama puts the Modelfile's SYSTEM in front
            system = {"role": ROLES["s"], "content": default_system}
            return execute(text, collate([system, *messages])) != expected
        except GoTemplateError as error:
            raise UnknownTemplateError(f"its Go form is wrong: {error}") from None

    for roles in _REQUIRED:
        if any(differs(roles, shift) for shift in range(len(_CONTENTS))):
            names = ", ".join(ROLES[r] for r in roles)
            raise UnknownTemplateError(f"pieces do not describe a conversation of {names}")
    rare = [what for roles, what in _RARE.items() if any(differs(roles, s) for s in range(3))]
    if any(differs(roles, 0, i) for roles in ("uau", "suau") for i in range(len(roles))):
        rare.append("a message is empty")
    if not rare:
        return ()
    return (f"TEMPLATE differs from the chat template if {' or '.join(dict.fromkeys(rare))}",)


def _source(pieces: ChatPieces) -> Iterator[str]:
    """The template's text. `{{-` and a line break in front of it write nothing."""
    yield from _definitions(
        {trim for by_last in pieces.trims.values() for trim in by_last.values()}
    )
    varied = [*pieces.before.values(), *pieces.trims.values(), pieces.prompt]
    has_last = any(len(set(texts.values())) > 1 for texts in varied)
    if has_last:
        yield '{{- $last := "" }}\n'
    if pieces.start:
        yield f"{{{{- {quote(pieces.start)} }}}}\n"
    yield f"{{{{- range {'$i, $_ := ' if pieces.in_last_user else ''}.Messages }}}}\n"
    word = "{{- if"
    for role in pieces.before:
        yield f'{word} eq .Role "{role}" }}}}'
        yield _before(pieces, role)
        yield _chosen(pieces.trims[role], _USUAL[role], lambda trim: _content(".Content", trim))
        yield (after := _literal(pieces.after[role]))
        is_open = after[-1:].isspace()
        yield "" if is_open else "\n"
        word = "{{ else if" if is_open else "{{- else if"
    yield "{{ end }}\n" if is_open else "{{- end }}\n"
    if has_last:
        yield "{{- $last = .Role }}\n"
    yield "{{- end }}" + _chosen(pieces.prompt, "user", _literal)


def _before(pieces: ChatPieces, role: str) -> str:
    usual = _chosen(pieces.before[role], _USUAL[role], _literal)
    if role != "user" or pieces.in_last_user is None:
        return usual
    start, end = map(_literal, pieces.in_last_user)
    system = _content("$.System", pieces.trims["system"][""])
    is_last = "and $.System (eq (len (slice $.Messages $i)) 1)"
    return f"{{{{ if {is_last} }}}}{start}{system}{end}{{{{ else }}}}{usual}{{{{ end }}}}"


def _chosen(texts: Mapping[str, str], usual: str, write: Callable[[str], str]) -> str:
    """What depends on the previous role, written by `write`; that of `usual` for other roles."""
    default = texts.get(usual, next(iter(texts.values()), ""))
    by_text: dict[str, list[str]] = {}
    for role, text in texts.items():
        if text != default:
            by_text.setdefault(text, []).append(role)
    if not by_text:
        return write(default)
    is_shared = write is _literal and all(text.endswith(default) for text in by_text)
    source, word = "", "if"
    for text, roles in by_text.items():
        names = " ".join(f'"{role}"' for role in roles)
        own = write(text.removesuffix(default) if is_shared else text)
        source += f"{{{{ {word} eq $last {names} }}}}{own}"
        word = "else if"
    if is_shared:
        return source + "{{ end }}" + write(default)
    return source + "{{ else }}" + write(default) + "{{ end }}"


def _content(path: str, trim: str) -> str:
    return f'{{{{ template "{trim}" {path} }}}}' if trim else f"{{{{ {path} }}}}"


def _literal(text: str) -> str:
    """Text as it stands; as a Go string where Go or the Modelfile would misread it."""
    plain = all(c in "\n\t" or c.isprintable() for c in text)
    if plain and "{{" not in text and not text.endswith("{") and '"""' not in text:
        return text
    return f"{{{{ {quote(text)} }}}}"


def _definitions(trims: set[str]) -> Iterator[str]:
    """Go definitions that write a string without white space as Python's `strip` sees it.

    text/template has neither arithmetic nor loops over strings: the length less n is the length of
    the string from n on, and a loop is a definition that calls itself.
    """
    spaces = [chr(code) for code in range(0x3001) if chr(code).isspace()]
    by_width = {n: " ".join(quote(s) for s in spaces if len(s.encode()) == n) for n in (1, 2, 3)}

    def cuts(found: Callable[[int], str], variable: str, value: Callable[[int], str]) -> str:
        return "".join(
            f"{{{{- if ge (len .) {n} }}}}{{{{ if eq ({found(n)}) {among} }}}}"
            f"{{{{ {variable} = {value(n)} }}}}{{{{ end }}}}{{{{ end }}}}\n"
            for n, among in by_width.items()
        )

    right = cuts(lambda n: f"slice . (len (slice . {n}))", "$end", lambda n: f"len (slice . {n})")
    left = cuts(lambda n: f"slice . 0 {n}", "$start", str)
    if trims & {"trim", "trimRight"}:
        yield (
            f'{{{{- define "trimRight" }}}}{{{{ $end := len . }}}}\n{right}'
            "{{- if eq $end (len .) }}{{ . }}{{ else }}"
            '{{ template "trimRight" (slice . 0 $end) }}{{ end }}{{ end }}\n'
        )
    for name, rest in (("trim", '{{ template "trimRight" . }}'), ("trimLeft", "{{ . }}")):
        if name in trims:
            yield (
                f'{{{{- define "{name}" }}}}{{{{ $start := 0 }}}}\n{left}'
                f"{{{{- if eq $start 0 }}}}{rest}{{{{ else }}}}"
                f'{{{{ template "{name}" (slice . $start) }}}}{{{{ end }}}}{{{{ end }}}}\n'
            )
