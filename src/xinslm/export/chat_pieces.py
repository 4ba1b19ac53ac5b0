"""What a chat template writes around the messages, found out by rendering probe conversations.

Each message of a probe has a content of its own, so the rendered text splits into the pieces
between the contents. From the pieces of a few conversations follow the texts before and after a
message of each role, the text that the answer continues, where the system message goes, and
whether contents are trimmed. A template that does not work this way is refused, with the reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str | None]
"""Messages, and whether the answer is to follow, to text; None if the template refuses them."""

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
_PLAIN = ("system", "user", "assistant")
_RARE = ("ua", "sua", "uasu", "au")
"""Conversations that may differ in what is between two roles; the caller says so."""
_PADDING = " \n\t\u00a0"
TRIMS: dict[str, Callable[[str], str]] = {
    "": str,
    "trim": str.strip,
    "trimLeft": str.lstrip,
    "trimRight": str.rstrip,
}
"""What a template may do with a content, by the name of its Go definition."""


class UnknownTemplateError(ValueError):
    """The chat template cannot be described by pieces; the message says why."""


@dataclass(frozen=True)
class ChatPieces:
    """The texts around the messages of a conversation."""

    before: Mapping[str, Mapping[str, str]]
    """Text before a message of a role, by the previous role ('' for the first message)."""
    after: Mapping[str, str]
    """Text after a message of a role, whatever follows."""
    prompt: Mapping[str, str]
    """Text that the answer continues, by the role of the last message."""
    trims: Mapping[str, Mapping[str, str]]
    """What happens to the content of a role, by the previous role: keys of `TRIMS`."""
    in_last_user: tuple[str, str] | None = None
    """Texts before and after the system message if it is written inside the last message, instead
    of that message's `before`."""
    start: str = ""
    """Text before everything, if the system message is written inside the last message."""
    default_system: str | None = None
    """System message that the template adds if there is none."""
    notes: tuple[str, ...] = ()


def conversation(roles: str, content: Callable[[int], str] | None = None) -> list[Message]:
    """Messages of the roles that `roles` names by their first letters."""
    make = content or mark
    return [{"role": ROLES[r], "content": make(i)} for i, r in enumerate(roles)]


def mark(index: int) -> str:
    """A word that no template writes."""
    return f"Qz{index}kW{index}x"


@dataclass(frozen=True)
class _Seen:
    """A rendered probe."""

    order: tuple[int, ...]
    """Indices of the messages in the order of the text; those left out are missing."""
    texts: tuple[str, ...]
    """Texts around the contents, one more than `order`."""


def _observe(render: Render, roles: str, prompt: bool = True) -> _Seen | None:
    text = render(conversation(roles), prompt)
    if text is None:
        return None
    places = sorted((text.find(mark(i)), i) for i in range(len(roles)) if mark(i) in text)
    if any(text.count(mark(i)) > 1 for _, i in places):
        raise UnknownTemplateError("it writes a message more than once")
    texts, done = [], 0
    for place, index in places:
        texts.append(text[done:place])
        done = place + len(mark(index))
    return _Seen(tuple(i for _, i in places), (*texts, text[done:]))


def derive(render: Render) -> ChatPieces:
    """Find the pieces of a chat template; UnknownTemplateError if it has none.

    The result describes the probes. Whether it holds for other conversations is for the caller to
    check.
    """
    with_system = _observe(render, "suau")
    if with_system is not None and with_system.order == (1, 2, 0, 3):
        return _in_last_user(render, with_system)
    notes: tuple[str, ...] = ()
    if with_system is None or 0 not in with_system.order:
        what = "refuses" if with_system is None else "leaves out"
        notes = (
            f"the chat template {what} system messages; so does TEMPLATE, by leaving them out",
        )
    elif with_system.order != (0, 1, 2, 3):
        raise UnknownTemplateError("it moves messages")
    has_system = not notes
    gaps = _gaps(render, has_system)
    closed = {
        role: seen.texts[-1]
        for roles, role in (("u", "user"), ("ua", "assistant"), ("s", "system"))
        if (seen := _observe(render, roles, False)) and len(seen.order) == len(roles)
    }
    after = {role: _after(role, gaps, closed) for role in _PLAIN}
    before: dict[str, dict[str, str]] = {role: {} for role in _PLAIN}
    prompt: dict[str, str] = {}
    for (previous, role), text in gaps.items():
        rest = text[len(after[previous]) :] if previous else text
        (before[role] if role else prompt)[previous] = rest
    if not has_system:
        del before["system"], after["system"]
    return ChatPieces(
        before,
        after,
        prompt,
        _trims(render, before),
        default_system=_default_system(render) if has_system else None,
        notes=notes,
    )


def _gaps(render: Render, has_system: bool) -> dict[tuple[str, str], str]:
    """Texts between two contents, by the roles; '' is the beginning or the end."""
    gaps: dict[tuple[str, str], str] = {}
    for roles in ("u", "uau", "uauau", "ua", "su", "suau", "sua", "uasu", "au"):
        if "s" in roles and not has_system:
            continue
        seen = _observe(render, roles)
        if seen is None or seen.order != tuple(range(len(roles))):
            if roles in ("u", "uau", "uauau", "su", "suau"):
                raise UnknownTemplateError(f"it refuses the roles {_named(roles)}")
            continue
        names = ["", *(ROLES[r] for r in roles), ""]
        for pair, text in zip(pairwise(names), seen.texts, strict=True):
            if gaps.setdefault(pair, text) != text and roles not in _RARE:
                first, second = (name or "the end" for name in pair)
                raise UnknownTemplateError(
                    f"what it writes between {first} and {second} depends on the place"
                )
    return gaps


def _named(roles: str) -> str:
    return ", ".join(ROLES[r] for r in roles)


def _after(role: str, gaps: Mapping[tuple[str, str], str], closed: Mapping[str, str]) -> str:
    """Longest text that follows a message of a role in any case; at most what ends it."""
    found = [text for (previous, _), text in gaps.items() if previous == role]
    return common_beginning([*found, *([closed[role]] if role in closed else [])])


def common_beginning(texts: list[str]) -> str:
    """Longest text that all begin with."""
    first, last = min(texts, default=""), max(texts, default="")
    equal = [a == b for a, b in zip(first, last, strict=False)]
    return first[: [*equal, False].index(False)]


def _in_last_user(render: Render, seen: _Seen) -> ChatPieces:
    """Pieces of a template that writes the system message inside the last message (Mistral)."""
    gaps = _gaps(render, has_system=False)
    closed = _observe(render, "u", False)
    after = {
        "user": _after("user", gaps, {"user": closed.texts[-1]} if closed else {}),
        "assistant": _after("assistant", gaps, {}),
    }
    usual = gaps["assistant", "user"][len(after["assistant"]) :]
    first = gaps["", "user"]
    answer = gaps["user", "assistant"][len(after["user"]) :]
    if not first.endswith(usual):
        # the turn's end also begins the next one: nothing is common to all ends of a turn
        after["assistant"], usual = gaps["assistant", "user"].removesuffix(first), first
        if not gaps["assistant", "user"].endswith(first):
            raise UnknownTemplateError("its first turn begins in a way of its own")
    before_system = seen.texts[2][len(after["assistant"]) :]
    prompt = {role: gaps[role, ""][len(after[role]) :] for role in after if (role, "") in gaps}
    before = {"user": {"": usual, "assistant": usual}, "assistant": {"user": answer}}
    return ChatPieces(
        before,
        after,
        prompt,
        _trims(render, before) | {"system": {"": _trim(render, "suau", 0)}},
        (before_system, seen.texts[3]),
        first.removesuffix(usual),
    )


def _trims(render: Render, before: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """What happens to contents, by role and previous role."""
    trims: dict[str, dict[str, str]] = {role: {} for role in before}
    for roles in ("u", "uau", "su", "uasu", "au"):
        for index, (previous, role) in enumerate(zip(" " + roles, roles, strict=False)):
            name, last = ROLES[role], ROLES.get(previous, "")
            if last in before.get(name, {}) and last not in trims[name]:
                trims[name][last] = _trim(render, roles, index)
    return trims


def _trim(render: Render, roles: str, index: int) -> str:
    """What the template does with white space around the content of a message."""
    plain = render(conversation(roles), True)
    padded = conversation(roles)
    content = padded[index]["content"]
    padded[index]["content"] = f"{_PADDING}{content}{_PADDING}"
    text = render(padded, True)
    for name, trim in TRIMS.items():
        changed = trim(padded[index]["content"])
        if plain is not None and text == plain.replace(content, changed):
            return name
    raise UnknownTemplateError(f"it changes the content of {ROLES[roles[index]]} messages")


def _default_system(render: Render) -> str | None:
    """System message that is there if the conversation has none."""
    without, given = render(conversation("u"), True), render(conversation("su"), True)
    assert without is not None and given is not None, "both were rendered before"
    user = mark(0)
    before, _, after = given.partition(mark(0))
    after = after.replace(mark(1), user)
    if len(without) <= len(before) + len(after):
        return None
    text = without[len(before) : len(without) - len(after)]
    if not text.strip() or (before + text + after) != without:
        return None
    same = [{"role": "system", "content": text}, *conversation("u")]
    return text if render(same, True) == without else None
