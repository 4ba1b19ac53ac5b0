"""Converts records of data files to documents: plain text, or a chat whose answers are targets.

    {"text"}                             plain text (another key with `text_field`)
    {"messages": [{"role", "content"}]}  chat
    {"conversations": [{"from", "value"}]}  chat, ShareGPT's format
    {"instruction", "input", "output"}   Alpaca: one question, one answer; "input" is
                                         optional
    {"prompt", "response" | "completion"}  the same
    {"turns": ["..."]}                   MT-bench: its first question, without an answer

If a record matches several of these, the first is used; chats come before text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xinslm.errors import XinslmError

SUPPORTED = (
    '{"text"}, {"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"instruction", "input", "output"}, {"prompt", "response"}, {"prompt", "completion"} and '
    '{"turns"}'
)
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True)
class Document:
    """One document: either `text` or `messages` is set."""

    source: str
    """Where it was read, 'file:line'."""
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    """A chat: {"role": "system" | "user" | "assistant", "content": ...} each."""

    @property
    def plain_text(self) -> str:
        """The text, or the messages of a chat joined by line ends."""
        return "\n".join(m["content"] for m in self.messages) if self.messages else self.text or ""

    def content(self) -> bytes:
        """Return bytes that are equal if and only if the documents are."""
        if self.text is not None:
            return b"text\n" + self.text.encode()
        return b"chat\n" + json.dumps(self.messages, sort_keys=True).encode()


def to_document(record: Any, source: str, text_field: str | None = None) -> Document:
    """Convert one record; XinslmError names `source` and what is wrong with it."""
    if not isinstance(record, Mapping):
        raise XinslmError(
            f"{source}: found {_kind(record)}, but a record must be an object. Supported formats: "
            f"{SUPPORTED}"
        )
    if text_field is not None:
        return Document(source, text=_string(record, text_field, source))
    if "messages" in record:
        return Document(source, messages=_messages(record["messages"], "messages", source))
    if "conversations" in record:
        messages = _messages(record["conversations"], "conversations", source)
        return Document(source, messages=messages)
    if "instruction" in record and "output" in record:
        question = _string(record, "instruction", source)
        if record.get("input"):
            question += "\n\n" + _string(record, "input", source)
        return _exchange(question, _string(record, "output", source), source)
    if "prompt" in record:
        for key in ("response", "completion"):
            if key in record:
                question = _string(record, "prompt", source)
                return _exchange(question, _string(record, key, source), source)
    if "turns" in record:
        question = _first_turn(record, source)
        return Document(source, messages=({"role": "user", "content": question},))
    if "text" in record:
        return Document(source, text=_string(record, "text", source))
    keys = ", ".join(repr(str(key)) for key in list(record)[:12]) or "none"
    raise XinslmError(
        f"{source}: unknown record format. Keys here: {keys}. Supported formats: {SUPPORTED}; "
        "for text under another key, pass --text-field KEY"
    )


def _first_turn(record: Mapping[str, Any], source: str) -> str:
    turns = record["turns"]
    if not isinstance(turns, list) or not turns:
        raise XinslmError(f"{source}: 'turns' must be a list of questions, but is {_kind(turns)}")
    return _string({"turns[0]": turns[0]}, "turns[0]", source)


def _exchange(question: str, answer: str, source: str) -> Document:
    messages = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return Document(source, messages=messages)


def _messages(value: Any, key: str, source: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise XinslmError(f"{source}: '{key}' must be a list of messages, but is {_kind(value)}")
    messages = []
    for index, message in enumerate(value):
        where = f"{source}: {key}[{index}]"
        if not isinstance(message, Mapping):
            raise XinslmError(f"{where} must be an object, but is {_kind(message)}")
        role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
        role = _string(message, role_key, where)
        if role not in _ROLES:
            raise XinslmError(f"{where} has the role '{role}'. Known roles: {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[role], "content": _string(message, content_key, where)})
    return tuple(messages)


def _string(record: Mapping[str, Any], key: str, source: str) -> str:
    if key not in record:
        keys = ", ".join(repr(str(k)) for k in list(record)[:12]) or "none"
        raise XinslmError(f"{source}: has no '{key}'. Keys here: {keys}")
    value = record[key]
    if not isinstance(value, str):
        raise XinslmError(f"{source}: '{key}' must be text, but is {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise XinslmError(
            f"{source}: '{key}' has half a surrogate pair (\\u{ord(value[error.start]):04x}) at "
            f"character {error.start}; it is not valid Unicode text"
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    other = "an object" if isinstance(value, Mapping) else type(value).__name__
    return names.get(type(value), "a string" if isinstance(value, str) else other)
