"""Jinja2 templates with limits: a template from a model folder must not hang or exhaust the memory.

Jinja2's sandbox protects Python's internals, but allows nested loops and `'a' * 10**10`. Here each
loop iteration, call and filter checks a deadline, and each value that can grow (joined, repeated,
replaced, padded, nested) is bounded before it is computed. A single step is therefore short, and
the deadline stops the rest without a thread or signal.

    environment = LimitedEnvironment()
    render(environment.compile_limited(source), {"messages": messages})
"""

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0
MAX_CHARACTERS = 4_000_000
MADE_BY_WRITTEN = 25
"""Maximum ratio of computed to written characters and list entries."""
MAX_BITS = 4096
"""Longest integer that a template may compute."""

_state = threading.local()

# How often the longest argument can be repeated in the result, by filter or method.
_REPEATS: dict[str, Callable[[str, tuple[Any, ...]], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch"), lambda s, _: 1),
    "translate": lambda s, _: len(s),
    **dict.fromkeys(("format", "format_map", "%"), lambda s, _: s.count("%") + s.count("{")),
    "slice": lambda s, _: 1,
    "expandtabs": lambda s, _: s.count("\t"),
    "indent": lambda s, _: len(s.splitlines()) + 1,
    "replace": lambda s, args: max((s.count(str(arg)) for arg in args), default=0),
}
# Quadratic in time, or not useful in a chat.
_REMOVED = ("striptags", "urlize", "pprint", "xmlattr", "wordwrap")


class LimitError(jinja2.TemplateError):
    """The template takes too long or produces too much text."""


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles templates whose every step is counted by `render`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)  # constant folding would bypass the limits
        del self.globals["lipsum"]
        for name in self.filters.keys() - set(_REMOVED):
            self.add_filter(name, self.filters[name])
        self.filters = {name: f for name, f in self.filters.items() if name not in _REMOVED}
        self.filters |= {"_each": _each, "_emit": _emit, "_bounded": _bounded}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter that respects the limits."""
        self.filters[name] = _limited(name, function)

    def compile_limited(self, source: str) -> jinja2.Template:
        """Compile a template; TemplateError if it is not one."""
        tree = self.parse(source)
        _Instrument().visit(tree)
        return self.from_string(tree)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method for the template."""
        _tick()
        if isinstance(obj, Macro):
            _weigh((args, kwargs))  # a macro sees its arguments as one tuple
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps str.format
        subject, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(subject, str | bytes | int):
            args = _foresee(name, subject, args, kwargs)
        return _checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` for the template."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            factor = right if operator == "**" else 1
            if abs(left.bit_length() * factor) + right.bit_length() > MAX_BITS:
                raise LimitError(f"it computes a number of more than {MAX_BITS} bits")
        elif operator == "*":
            sizes = [x if isinstance(x, int) else _weigh(x) for x in (left, right)]
            _require(sizes[0] * sizes[1])
        elif operator == "%" and isinstance(left, str | bytes):
            _foresee("%", left, (right,), {})
        return _checked(super().call_binop(context, operator, left, right))


def render(template: jinja2.Template, names: dict[str, Any]) -> str:
    """Render a template of a `LimitedEnvironment`; LimitError if it exceeds the limits.

    The output may have eight times the size of `names` plus MAX_CHARACTERS.
    """
    _state.deadline, _state.written = time.monotonic() + MAX_SECONDS, 0
    _state.made = 0
    _state.most = MAX_CHARACTERS
    _state.most += 8 * _weigh(names, most=float("inf"))
    return template.render(**names)


class _Instrument(NodeTransformer):
    """Wraps loops, outputs and expressions that build new values in the counting filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _filter(nodes.Const(n.data) if isinstance(n, nodes.TemplateData) else n, "_emit")
            for n in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filter(n, "_bounded") for n in node.nodes]
        return _filter(node, "_bounded")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_bounded")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_bounded") if node.ctx == "load" else node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Counted:
    """An iterable whose iterations check the clock; its length is that of the original."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        for value in self.values:
            _tick()
            yield value


@pass_context  # jinja2 does not compute such filters while it compiles
def _each(context: Any, values: Any) -> _Counted:
    return _Counted(values)


@pass_context
def _emit(context: Any, value: Any) -> Any:
    _state.written += len(value) if isinstance(value, str) else _weigh(value)
    _require(_state.written)
    return value


@pass_context
def _bounded(context: Any, value: Any) -> Any:
    _weigh(value)
    return value


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter `function` with its result bounded before and after it is computed."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _tick()
        before, (value, *others) = args[:place], args[place:]
        if name == "join":  # the argument of a method, the subject of a filter
            value = list(value)
            _require(_weigh(value) + len(value) * _longest([*others, *kwargs.values()]))
        elif name == "sum":
            if not all(
                isinstance(given, int | float | str) for given in (*others, *kwargs.values())
            ):
                raise LimitError("it adds up lists")
        elif name == "tojson":
            _weigh(value)
            if _longest([*others, *kwargs.values()]) > 100:
                raise LimitError("it indents too far")
        else:
            _foresee(name, value, tuple(others), kwargs)
        return _checked(function(*before, value, *others, **kwargs))

    return limited


def _foresee(
    name: str, subject: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Bound the result of a method or filter of `subject`; return its arguments."""
    if name == "join":
        args = (list(args[0]), *args[1:]) if args else args
        _require(_weigh(args) + len(subject) * sum(len(arg) for arg in args))
    elif name in _REPEATS:
        given = (*args, *kwargs.values())
        text = subject.decode("latin-1") if isinstance(subject, bytes) else str(subject)
        if name in ("format", "format_map", "%"):  # widths may also be written in the text
            given = (*given, *map(int, re.findall(r"\d{1,18}", text)))
        _require(len(text) + _REPEATS[name](text, given) * _longest(given))
    return args


def _longest(value: Any) -> int:
    """Return the largest number or length within arguments."""
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, dict):
        return max(map(_longest, value.values()), default=0)
    if isinstance(value, list | tuple):
        return max(map(_longest, value), default=0)
    return len(value) if isinstance(value, str | bytes) else 64


def _checked(result: Any) -> Any:
    """Return a result; LimitError if it is too large."""
    if isinstance(result, str | bytes | list | tuple | dict):
        _weigh(result)
        _state.made += len(result)
        _require(_state.made / MADE_BY_WRITTEN)
    return result


def _weigh(value: Any, most: float | None = None) -> int:
    """Estimate the number of characters of `value` in text form; LimitError if too many."""
    total = _weight(value, {})
    _require(total, most)
    return total


def _weight(value: Any, known: dict[int, int]) -> int:
    """Like `_weigh`; repeated lists are counted each time, but visited once."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if not isinstance(value, dict | list | tuple):
        return 0 if isinstance(value, Undefined) else 8
    if id(value) not in known:
        known[id(value)] = 0  # a namespace can hold itself
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = sum(_weight(part, known) + 2 for part in parts)
    return known[id(value)]


def _require(characters: float, most: float | None = None) -> None:
    if characters > (_state.most if most is None else most):
        raise LimitError("it produces too much text")


def _tick() -> None:
    if time.monotonic() > _state.deadline:
        raise LimitError(f"it runs for more than {MAX_SECONDS:g} s")
