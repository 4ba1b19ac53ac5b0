"""A chat template as Ollama's: Go's text/template over `.Messages`, checked before it is used.

The text is made (`ollama_source.py`) of the pieces that `chat_pieces.py` and, for tools,
`tool_pieces.py` find, and executed by `go_template.py` on conversations that the pieces were not
found with. One that differs from the Jinja template's text refuses the template, or its tools; a
rare one that differs (a system message in the middle, reasoning in an answer) becomes a note.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from xinslm.export.go_template import GoTemplateError, Struct, execute
from xinslm.export.ollama_source import template_source
from xinslm.export.tool_pieces import Tool, ToolPieces, ToolRender, call, derive_tools
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.chat import render_chat

_DATE = "\ufdd3"
"""What `strftime_now` gives here: a noncharacter that no text contains."""
_CONTENTS = (
    "Hello, World!",
    "two\n\nlines {{ .Content }} {% if x %} 'single' \"double\" \\ <b>&amp;</b>",
    "  naïve 東京 🙂\t",
    "\u3000\u00a0 wide spaces \u2003\n\n",
    "x",
    '{"name": "f", "arguments": {}}',
)
_REASONING = "<think>\nsure?\n</think>\n\nYes."
_REQUIRED = ("u", "uau", "uauau", "uauauau", "su", "suau", "suauau")
_RARE = {
    "ua": "the last message is the assistant's",
    "sua": "the last message is the assistant's",
    "uasu": "a system message follows an answer",
    "suasu": "a system message follows an answer",
    "au": "the assistant begins",
    "sau": "the assistant begins",
}
_TOOL_CONVERSATIONS = (
    ("u", 0, ""),
    ("su", 0, ""),
    ("uau", 0, ""),
    ("suau", 0, ""),
    ("uat", 1, ""),
    ("suat", 1, ""),
    ("uat", 1, "Let me see."),
    ("suatt", 2, ""),
    ("uattau", 2, "Two of them:"),
    ("suatau", 1, ""),
)
"""Roles, calls in the message before the first result, and the content of that message."""
_EXAMPLE_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a "place" <b>&amp;</b>:\n\t東京, {x} \\u003c \u2028\x0c',
        "parameters": {
            "type": "object",
            "properties": {
                "days": {"type": "array", "items": {"type": "integer"}, "description": "a, b"},
                "unit": {"type": "string", "description": "°", "enum": ["<C>", 'F: "f"']},
                "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
            },
            "required": ["unit", "days"],
        },
    },
}
_SHORT_TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}
_EXAMPLE_ARGUMENTS = {"days": [1, 2], "unit": '<C> & "d"\n東', "where": {"lat": -0.5, "on": True}}


@dataclass(frozen=True)
class OllamaTemplate:
    """A template that renders the probes as the Jinja template does."""

    text: str
    pieces: ChatPieces
    notes: tuple[str, ...]
    has_tools: bool = False


def make_template(tokenizer: Tokenizer, adds_bos: bool) -> OllamaTemplate:
    """Write a tokenizer's chat template as Ollama's; UnknownTemplateError says why it cannot be.

    `adds_bos`: llama.cpp puts BOS in front, so the text begins after it.
    """
    with_tools = _renderer(tokenizer, adds_bos)

    def render(messages: list[Message], prompt: bool) -> str | None:
        return with_tools(messages, prompt, ())

    pieces = derive(render)
    text = template_source(pieces)
    rare = _check(text, render, pieces.default_system)
    plain = OllamaTemplate(text, pieces, (*pieces.notes, *rare))
    if not re.search(r"\btools\b", tokenizer.chat_template or ""):
        return plain
    try:
        tools = derive_tools(with_tools, pieces)
        text = template_source(pieces, tools)
        rare = _check(text, render, pieces.default_system)
        _check_tools(text, with_tools, tools)
    except UnknownTemplateError as error:
        return replace(plain, notes=(*plain.notes, f"TEMPLATE has no tools: {error}"))
    return OllamaTemplate(text, pieces, (*pieces.notes, *rare), has_tools=True)


def collate(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> dict[str, Any]:
    """The data that Ollama executes a template with: neighbours of one role become one message,
    unless they are results of tools.
    """
    merged: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if merged and merged[-1]["Role"] == role != "tool":
            merged[-1]["Content"] += "\n\n" + message["content"]
            continue
        calls = [
            {"Function": {name.title(): value for name, value in call["function"].items()}}
            for call in message.get("tool_calls", ())
        ]
        merged.append({"Role": role, "Content": message["content"], "ToolCalls": calls})
    system = [message["content"] for message in messages if message["role"] == "system"]
    return {
        "System": "\n\n".join(system),
        "Messages": merged,
        "Tools": [_struct(tool) for tool in tools],
    }


def _struct(tool: Tool) -> Struct:
    """A tool as Ollama reads it, with its order of keys."""
    function, known = tool["function"], ("type", "required", "properties")
    given = function["parameters"]
    parameters = Struct({name.title(): given.get(name) for name in known})
    return Struct(
        Type=tool["type"],
        Function=Struct(
            Name=function["name"],
            Description=function.get("description"),
            Parameters=parameters,
        ),
    )


def _renderer(tokenizer: Tokenizer, adds_bos: bool) -> ToolRender:
    bos = tokenizer.named_tokens.get("bos_token") or ""
    if tokenizer.start_ids:
        ids = {token: text for text, token in tokenizer.special_tokens.items()}
        bos = ids.get(tokenizer.start_ids[0], bos)

    def render(messages: list[Message], prompt: bool, tools: Sequence[Tool]) -> str | None:
        names: dict[str, Any] = {"strftime_now": lambda pattern: _DATE}
        if tools:
            names["tools"] = list(tools)
        try:
            text = render_chat(tokenizer, messages, prompt, **names)
        except XinslmError:
            return None
        if _DATE in text:
            raise UnknownTemplateError("it writes today's date, which Ollama writes otherwise")
        return text.removeprefix(bos) if adds_bos else text

    return render


def _check(text: str, render: Render, default_system: str | None) -> tuple[str, ...]:
    """Compare with the Jinja template; UnknownTemplateError if they differ, notes if rarely."""

    def differs(roles: str, shift: int, at: int = -1, content: str = "") -> bool:
        messages = conversation(
            roles, lambda i: content if i == at else _CONTENTS[(i + shift) % len(_CONTENTS)]
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
    if differs("uau", 0, 1, _REASONING):
        rare.append("an answer holds its reasoning in <think>, which Ollama removes if it can")
    if not rare:
        return ()
    return (f"TEMPLATE differs from the chat template if {' or '.join(dict.fromkeys(rare))}",)


def _check_tools(text: str, render: ToolRender, pieces: ToolPieces) -> None:
    """Compare conversations with tools; UnknownTemplateError if one differs."""
    tools = [_EXAMPLE_TOOL, _SHORT_TOOL]
    for roles, num_calls, start in _TOOL_CONVERSATIONS:
        if pieces.system is None and "s" in roles:
            continue
        for shift in range(len(_CONTENTS)):
            contents = [_CONTENTS[(i + shift) % len(_CONTENTS)] for i in range(len(roles))]
            messages = conversation(roles, contents.__getitem__)
            at = roles.find("at")
            if at >= 0:
                calls = [call(i, **_EXAMPLE_ARGUMENTS) for i in range(num_calls)]
                messages[at] |= {"content": start, "tool_calls": calls}
            given = (tools, tools[:1], tools[1:])[shift % 3]
            expected = render(messages, True, given)
            names = ", ".join(ROLES[r] for r in roles)
            if expected is None and num_calls < 2:
                raise UnknownTemplateError(f"it refuses tools with the roles {names}")
            if expected is not None and not _gives(
                text, messages, given, expected, pieces.chat.default_system
            ):
                raise UnknownTemplateError(
                    f"pieces do not describe a conversation of {names} with tools"
                )


def _gives(
    text: str,
    messages: list[Message],
    tools: Sequence[Tool],
    expected: str,
    default_system: str | None,
) -> bool:
    """Whether the template writes `expected`, also behind the Modelfile's SYSTEM."""
    given = [messages]
    if default_system is not None and messages[0]["role"] != "system":
        given.append([{"role": "system", "content": default_system}, *messages])
    try:
        return all(execute(text, collate(chat, tools)) == expected for chat in given)
    except GoTemplateError as error:
        raise UnknownTemplateError(f"its Go form is wrong: {error}") from None
