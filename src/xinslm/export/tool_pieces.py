"""What a chat template writes around tools, calls of tools and their results.

Known are the templates that write, in front of the first user message, every tool as JSON in one
line (Hermes, Qwen) or indented (LLaMA 3.1), calls as a JSON object of name and arguments, and
results as messages of their own. The texts around these are found by rendering probes, as in
`chat_pieces.py`; whether they hold for other conversations is for the caller to check.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from xinslm.export.chat_pieces import (
    ROLES,
    ChatPieces,
    Message,
    UnknownTemplateError,
    common_beginning,
    conversation,
    mark,
)
from xinslm.export.go_json import spell

Tool = dict[str, Any]
ToolRender = Callable[[list[Message], bool, Sequence[Tool]], str | None]
"""Messages, whether the answer is to follow, and tools, to text; None if refused."""


@dataclass(frozen=True)
class ToolPieces:
    """The texts around tools and calls."""

    system: str | None
    """Before the system message that is followed by tools; None if there are none of these."""
    before_tools: str
    """Between the system message and the first tool."""
    alone: str
    """Before the first tool without a system message."""
    between_tools: str
    after_tools: str
    """Between the last tool and the content of the first user message."""
    is_indented: bool
    call: tuple[str, str, str]
    """Before the name, between name and arguments, after the arguments."""
    between_calls: str
    after_content: str | None
    """Between the content of a message and its first call; None if the content is left out."""
    is_quoted: bool
    """Whether results are written as a string of JSON."""
    chat: ChatPieces
    """The pieces of all messages, those of the role 'tool' among them."""


def call(index: int, **arguments: Any) -> dict[str, Any]:
    """A call as messages hold it; its name is `mark(index)`."""
    return {"type": "function", "function": {"name": mark(index), "arguments": arguments}}


def derive_tools(render: ToolRender, chat: ChatPieces) -> ToolPieces:
    """Find the pieces; UnknownTemplateError if the template's tools are not of a known form."""
    if chat.in_last_user is not None:
        raise UnknownTemplateError("the system message stands in the last message")
    tools = [_probe_tool(8), _probe_tool(9)]
    alone, _, between, after_tools, is_indented = _around_tools(render, tools, "u")
    system, before_tools = None, ""
    if "system" in chat.before:
        system, before_tools, *others = _around_tools(render, tools, "su")
        if others != [between, after_tools, is_indented]:
            raise UnknownTemplateError("what follows a tool depends on the system message")

    def with_tool(messages: list[Message], prompt: bool) -> str | None:
        return render(messages, prompt, tools[:1])

    whole, is_quoted = _with_results(with_tool, chat)
    texts, between_calls, after_content = _around_calls(with_tool, whole)
    return ToolPieces(
        system,
        before_tools,
        alone,
        between,
        after_tools,
        is_indented,
        texts,
        between_calls,
        after_content,
        is_quoted,
        whole,
    )


def _probe_tool(index: int) -> Tool:
    properties = {mark(index): {"type": "string", "description": "d"}}
    parameters = {"type": "object", "properties": properties, "required": [mark(index)]}
    function = {"name": mark(index), "description": "a probe", "parameters": parameters}
    return {"type": "function", "function": function}


def _split(text: str | None, marks: Sequence[str], what: str) -> list[str]:
    """Texts around the marks, each of which occurs once, in this order."""
    parts = []
    for word in marks:
        if text is None or text.count(word) != 1:
            raise UnknownTemplateError(f"it refuses or rewrites {what}")
        before, _, text = text.partition(word)
        parts.append(before)
    return [*parts, text or ""]


def _around_tools(
    render: ToolRender, tools: Sequence[Tool], roles: str
) -> tuple[str, str, str, str, bool]:
    """Texts before the system message, before, between and after two tools; whether indented."""
    text = render(conversation(roles), True, tools)
    for is_indented in (False, True):
        spelled = [spell(tool, is_indented) for tool in tools]
        if text is not None and all(text.count(tool) == 1 for tool in spelled):
            break
    else:
        raise UnknownTemplateError("it does not write tools as JSON")
    marks = [mark(0), *spelled, mark(1)] if roles == "su" else [*spelled, mark(0)]
    parts = _split(text, marks, "tools in front of the first user message")
    if roles == "u":
        parts.insert(1, "")
    return parts[0], parts[1], parts[2], parts[3], is_indented


def _with_results(
    render: Callable[[list[Message], bool], str | None], chat: ChatPieces
) -> tuple[ChatPieces, bool]:
    """The pieces with those of results, and whether results are quoted."""
    gaps: dict[tuple[str, str], str] = {}
    for roles in ("uat", "uattau", "uatu"):
        text = render(conversation(roles), True)
        if text is None and roles == "uatu":
            continue
        parts = _split(text, [mark(i) for i in range(len(roles))], "results of tools")
        names = [ROLES[r] for r in roles]
        for pair, part in zip(pairwise([*names, ""]), parts[1:], strict=True):
            if "tool" in pair and gaps.setdefault(pair, part) != part:
                raise UnknownTemplateError("what surrounds a result depends on the place")
    closed = render(conversation("uat"), False)
    found = [part for (previous, _), part in gaps.items() if previous == "tool"]
    after = common_beginning([*found, *([closed.partition(mark(2))[2]] if closed else [])])
    start = chat.after["assistant"]
    if not gaps["assistant", "tool"].startswith(start):
        raise UnknownTemplateError("a message that a result follows ends in a way of its own")
    before = {role: dict(texts) for role, texts in chat.before.items()}
    before["tool"] = {"assistant": gaps["assistant", "tool"][len(start) :]}
    prompt = dict(chat.prompt)
    for (previous, role), part in gaps.items():
        if previous == "tool":
            (before[role] if role else prompt)[previous] = part[len(after) :]
    content = 'two\n"words"'
    messages = conversation("uat")
    messages[2]["content"] = content
    text, plain = render(messages, True), render(conversation("uat"), True)
    assert plain is not None, "it was rendered before"
    quoted = spell(content)[1:-1]
    if text not in (plain.replace(mark(2), content), plain.replace(mark(2), quoted)):
        raise UnknownTemplateError("it changes the content of results")
    is_quoted = text == plain.replace(mark(2), quoted)
    trims = {**chat.trims, "tool": {"assistant": "jsonBody" if is_quoted else ""}}
    whole = replace(
        chat, before=before, after={**chat.after, "tool": after}, prompt=prompt, trims=trims
    )
    return whole, is_quoted


def _around_calls(
    render: Callable[[list[Message], bool], str | None], chat: ChatPieces
) -> tuple[tuple[str, str, str], str, str | None]:
    """Texts around name and arguments, between two calls, and between content and first call."""
    arguments: list[dict[str, Any]] = [
        {"a": mark(5), "b": [1, True]},
        {"a": mark(6), "b": [2, None]},
    ]
    calls = [call(3, **arguments[0]), call(4, **arguments[1])]
    spelled = [spell(value) for value in arguments]
    head = chat.after["user"] + chat.before["assistant"]["user"]
    tail = chat.after["assistant"] + chat.before["tool"]["assistant"]

    def text(content: str, count: int) -> str | None:
        messages = conversation("uat")
        messages[1] |= {"content": content, "tool_calls": calls[:count]}
        return render(messages, True)

    marks = [mark(0), mark(3), spelled[0], mark(2)]
    _, before, middle, after, _ = _split(text("", 1), marks, "calls of tools")
    if not before.startswith(head) or not after.endswith(tail):
        raise UnknownTemplateError("messages with calls begin or end in a way of their own")
    before, after = before[len(head) :], after[: len(after) - len(tail)]
    between = ""
    if (two := text("", 2)) is not None:
        inner = _split(two, [spelled[0], mark(4)], "two calls of tools")[1]
        if not inner.startswith(after) or not inner.endswith(before):
            raise UnknownTemplateError("what it writes between calls depends on the place")
        between = inner[len(after) : len(inner) - len(before)]
    said = text(mark(1), 1)
    if said is None or mark(1) not in said:
        return (before, middle, after), between, None
    inner = _split(said, [mark(1), mark(3)], "calls that follow a text")[1]
    if not inner.endswith(before):
        raise UnknownTemplateError("a call that follows a text begins in a way of its own")
    return (before, middle, after), between, inner[: len(inner) - len(before)]
