"""Go's text/template, as far as the templates of `ollama.py` need it: parse and execute.

An Ollama template is written only if this evaluator renders probe conversations exactly as the
model's Jinja template does. Strings are bytes here, because Go slices bytes. What is supported:
text, trim markers, `if`, `range`, `define`, `template`, variables, fields, strings, integers, and
the functions below. Anything else is an error; nothing is guessed.

    execute('{{ range .Messages }}{{ .Role }}: {{ .Content }}{{ end }}', {"Messages": messages})
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(
    r"""\{\{(-(?=\s))?\s*((?:"(?:[^"\\\n]|\\.)*"|[^"])*?)\s*((?<=\s)-)?\}\}""", re.S
)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<number>\d+)|(?P<mark>:=|=|[(),])"""
    r"""|(?P<path>\$\w*(?:\.\w+)*|(?:\.\w+)+|\.)|(?P<word>\w+)|(?P<bad>\S))"""
)
_SPACE = " \t\r\n"
_MISSING: dict[str, Any] = {}


class GoTemplateError(ValueError):
    """The template is not one, or uses what this evaluator does not know."""


@dataclass
class _Node:
    """One node of the tree; `kind` is text, output, set, if, range or template."""

    kind: str
    value: Any = None
    body: list["_Node"] = field(default_factory=list)
    otherwise: list["_Node"] = field(default_factory=list)
    names: tuple[str, ...] = ()


def execute(source: str, data: dict[str, Any]) -> str:
    """Render a template; strings in `data` are str. GoTemplateError for what is not known here."""
    templates: dict[str, list[_Node]] = {}
    pieces = _pieces(source)
    root = _Parser(pieces, templates).block(())[0]
    run = _Run(templates)
    start = _encode(data)
    return run.output(root, start).decode("utf-8")


def _encode(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, dict):
        return type(value)({key: _encode(item) for key, item in value.items()})
    return [_encode(item) for item in value] if isinstance(value, list) else value


class Struct(dict[str, Any]):
    """A struct with exported fields; in JSON their names are in lower case, and fields that are
    None are left out.
    """


def _json(value: Any) -> bytes:
    """Ollama's function: Go's json.Marshal."""
    text = json.dumps(_decode(value), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8")


def _decode(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Struct):
        return {key.lower(): _decode(item) for key, item in value.items() if item is not None}
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _printf(pattern: bytes, *values: bytes) -> bytes:
    parts = pattern.split(b"%s")
    if len(parts) != len(values) + 1 or b"%" in b"".join(parts):
        raise GoTemplateError(f"printf knows %s here, once for each value: {pattern!r}")
    return b"".join(part for pair in zip(parts, (*values, b""), strict=True) for part in pair)


def _pieces(source: str) -> Iterator[tuple[bool, str]]:
    """Texts and actions in turn; the texts are trimmed where actions have markers."""
    done, trim = 0, False
    for match in [*_ACTION.finditer(source), None]:
        text = source[done : match.start() if match else len(source)]
        if trim:
            text = text.lstrip(_SPACE)
        if match is None:
            if "{{" in text:
                raise GoTemplateError("an action is not closed")
            yield False, text
            return
        yield False, text.rstrip(_SPACE) if match[1] else text
        yield True, match[2]
        done, trim = match.end(), bool(match[3])


class _Parser:
    def __init__(
        self, pieces: Iterator[tuple[bool, str]], templates: dict[str, list[_Node]]
    ) -> None:
        self._pieces, self._templates = pieces, templates

    def block(self, ends: tuple[str, ...]) -> tuple[list[_Node], str]:
        """Nodes up to an action that begins with one of `ends`, and that action."""
        nodes: list[_Node] = []
        for is_action, text in self._pieces:
            if not is_action:
                if text:
                    nodes.append(_Node("text", text.encode("utf-8")))
                continue
            word, _, rest = text.partition(" ")
            if word in ends:
                return nodes, text
            if node := self._action(word, rest, text):
                nodes.append(node)
        if ends:
            raise GoTemplateError("an {{ end }} is missing")
        return nodes, ""

    def _action(self, word: str, rest: str, text: str) -> _Node | None:
        if word == "if":
            return self._branch(_expression(rest))
        if word == "range":
            names, _, value = rest.rpartition(":=")
            variables = tuple(name.strip() for name in names.split(",") if name.strip())
            body, _ = self.block(("end",))
            return _Node("range", _expression(value), body, names=variables)
        if word == "define":
            name = json.loads(rest)
            self._templates[name], _ = self.block(("end",))
            return None
        if word == "template":
            name, _, value = rest.partition(" ")
            return _Node("template", (json.loads(name), _expression(value)))
        if assigned := re.fullmatch(r"(\$\w+)\s*(:?=)\s*(.*)", text, re.S):
            return _Node("set", _expression(assigned[3]), names=(assigned[1], assigned[2]))
        return _Node("output", _expression(text))

    def _branch(self, condition: Any) -> _Node:
        body, end = self.block(("else", "end"))
        node = _Node("if", condition, body)
        if end.startswith("else if "):
            node.otherwise = [self._branch(_expression(end.removeprefix("else if ")))]
        elif end == "else":
            node.otherwise, _ = self.block(("end",))
        return node


def _expression(source: str) -> Any:
    """A constant (tagged tuple), a path, or a call ('call', name, arguments)."""
    tokens = [(str(match.lastgroup), match[0].strip()) for match in _TOKEN.finditer(source.strip())]
    value, rest = _call(tokens)
    if rest:
        raise GoTemplateError(f"cannot read '{source}'")
    return value


def _call(tokens: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    if not tokens:
        raise GoTemplateError("an action is empty")
    kind, text = tokens[0]
    if kind != "word":
        return _operand(tokens)
    arguments, rest = [], tokens[1:]
    while rest and rest[0][1] != ")":
        argument, rest = _operand(rest)
        arguments.append(argument)
    if text not in _FUNCTIONS:
        raise GoTemplateError(f"there is no function '{text}' here")
    return ("call", text, arguments), rest


def _operand(tokens: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    (kind, text), rest = tokens[0], tokens[1:]
    if kind == "string":
        return ("constant", _unquote(text)), rest
    if kind == "number":
        return ("constant", int(text)), rest
    if kind == "path":
        root, *fields = text.split(".") if text != "." else [""]
        return ("path", root, [name for name in fields if name]), rest
    if text == "(":
        value, rest = _call(rest)
        if not rest or rest[0][1] != ")":
            raise GoTemplateError("a parenthesis is not closed")
        return value, rest[1:]
    raise GoTemplateError(f"cannot read '{text}'")


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


def _unquote(literal: str) -> bytes:
    """The bytes of an interpreted Go string."""

    def decode(match: re.Match[str]) -> str:
        if match[1] in _ESCAPES:
            return _ESCAPES[match[1]]
        return chr(int(match[1][1:], 16))

    pattern = r"\\(u[0-9a-f]{4}|U[0-9a-f]{8}|[ntr\"\\])"
    if re.sub(pattern, "", literal[1:-1]).count("\\"):
        raise GoTemplateError(f"unknown escape in {literal}")
    return re.sub(pattern, decode, literal[1:-1]).encode("utf-8")


def quote(text: str) -> str:
    """A Go string of printable ASCII, and of the printable characters beyond."""
    escaped = {value: f"\\{key}" for key, value in _ESCAPES.items()}
    return '"' + "".join(escaped.get(c) or _printable(c) for c in text) + '"'


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    stop = len(value) if end is None else end
    if not 0 <= start <= stop <= len(value):
        raise GoTemplateError(f"slice {start} to {stop} of {len(value)}")
    return value[start:stop]


_FUNCTIONS = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, other: first != other,
    "ge": lambda first, other: first >= other,
    "not": lambda value: not value,
    "len": len,
    "slice": _slice,
    "json": _json,
    "printf": _printf,
    "and": None,
    "or": None,
}


_Scopes = list[dict[str, Any]]
"""The variables, the innermost block's last."""
_Frame = tuple[Iterator[_Node], Any, _Scopes]
"""What is left of a block, its dot and its variables."""


class _Run:
    """One execution. A stack of its own: definitions that call themselves go deeper than Python."""

    def __init__(self, templates: dict[str, list[_Node]]) -> None:
        self._templates = templates
        self._stack: list[_Frame] = []

    def output(self, nodes: list[_Node], dot: Any) -> bytes:
        """Output of a template for the data `dot`."""
        self._stack = [(iter(nodes), dot, [{"$": dot}])]
        output: list[bytes] = []
        while self._stack:
            rest, dot, scopes = self._stack[-1]
            node = next(rest, None)
            if node is None:
                self._stack.pop()
            elif node.kind == "text":
                output.append(node.value)
            elif node.kind == "output":
                value = self._value(node.value, dot, scopes)
                output.append(value if isinstance(value, bytes) else str(value).encode())
            else:
                self._enter(node, dot, scopes)
        return b"".join(output)

    def _enter(self, node: _Node, dot: Any, scopes: _Scopes) -> None:
        """Put the blocks that a node executes on the stack."""
        if node.kind == "template":
            name, value = node.value
            argument = self._value(value, dot, scopes)
            if name not in self._templates:
                raise GoTemplateError(f"there is no template '{name}'")
            self._stack.append((iter(self._templates[name]), argument, [{"$": argument}]))
            return
        value = self._value(node.value, dot, scopes)
        if node.kind == "set":
            self._assign(node, value, scopes)
        elif node.kind == "if":
            body = node.body if value else node.otherwise
            self._stack.append((iter(body), dot, [*scopes, {}]))
        else:
            for index, item in reversed(list(enumerate(value or []))):
                bound = dict(zip(node.names, (index, item)[-len(node.names) :], strict=False))
                self._stack.append((iter(node.body), item, [*scopes, bound]))

    def _assign(self, node: _Node, value: Any, scopes: _Scopes) -> None:
        name, operator = node.names
        if operator == ":=":
            scopes[-1][name] = value
            return
        for scope in reversed(scopes):
            if name in scope:
                scope[name] = value
                return
        raise GoTemplateError(f"{name} is not declared")

    def _value(self, node: Any, dot: Any, scopes: _Scopes) -> Any:
        kind, *rest = node
        if kind == "constant":
            return rest[0]
        if kind == "path":
            return self._path(rest[0], rest[1], dot, scopes)
        name, arguments = rest
        if name in ("and", "or"):
            value = None
            for argument in arguments:
                value = self._value(argument, dot, scopes)
                if bool(value) == (name == "or"):
                    break
            return value
        values = [self._value(argument, dot, scopes) for argument in arguments]
        return _FUNCTIONS[name](*values)  # type: ignore[misc]

    def _path(self, root: str, fields: list[str], dot: Any, scopes: _Scopes) -> Any:
        value = dot
        if root:
            found = [scope[root] for scope in reversed(scopes) if root in scope]
            if not found:
                raise GoTemplateError(f"{root} is not declared")
            value = found[0]
        for name in fields:
            value = (value or _MISSING).get(name)
        return value
