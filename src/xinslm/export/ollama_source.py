"""The text of an Ollama template: pieces of a chat template, joined in Go's text/template."""

from collections.abc import Callable, Iterator, Mapping

from xinslm.export.chat_pieces import ChatPieces
from xinslm.export.go_json import definitions, tool_source
from xinslm.export.go_template import quote
from xinslm.export.tool_pieces import ToolPieces

_USUAL = {"system": "", "user": "assistant", "assistant": "user", "tool": "assistant"}
"""The role before a message of each role whose texts serve where no other was seen."""


def template_source(pieces: ChatPieces, tools: ToolPieces | None = None) -> str:
    """Write the template of a chat, with tools if their pieces are given."""
    return "".join(_source(pieces if tools is None else tools.chat, tools))


def _source(pieces: ChatPieces, tools: ToolPieces | None) -> Iterator[str]:
    """The template's text. `{{-` and a line break in front of it write nothing."""
    yield from _definitions(
        {trim for by_last in pieces.trims.values() for trim in by_last.values()}
    )
    if tools is not None:
        yield from definitions(tools.is_indented, tools.is_quoted)
    varied = [*pieces.before.values(), *pieces.trims.values(), pieces.prompt]
    has_last = tools is not None or any(len(set(texts.values())) > 1 for texts in varied)
    if has_last:
        yield '{{- $last := "" }}\n'
    if pieces.start:
        yield f"{{{{- {quote(pieces.start)} }}}}\n"
    has_index = pieces.in_last_user is not None or tools is not None
    yield f"{{{{- range {'$i, $_ := ' if has_index else ''}.Messages }}}}\n"
    word = "{{- if"
    for condition, body in _branches(pieces, tools):
        yield f"{word} {condition} }}}}{body}"
        is_open = body[-1:].isspace()
        yield "" if is_open else "\n"
        word = "{{ else if" if is_open else "{{- else if"
    yield "{{ end }}\n" if is_open else "{{- end }}\n"
    if has_last:
        yield "{{- $last = .Role }}\n"
    yield "{{- end }}" + _chosen(pieces.prompt, "user", _literal)


def _branches(pieces: ChatPieces, tools: ToolPieces | None) -> Iterator[tuple[str, str]]:
    """Conditions, and what is written for a message if no earlier one holds."""
    if tools is not None:
        yield from _with_tools(pieces, tools)
    for role in pieces.before:
        content = _chosen(pieces.trims[role], _USUAL[role], lambda trim: _content(".Content", trim))
        if role == "assistant" and tools is not None:
            content = _calls(tools, content)
        body = _before(pieces, role) + content + _literal(pieces.after[role])
        yield f'eq .Role "{role}"', body


def _with_tools(pieces: ChatPieces, tools: ToolPieces) -> Iterator[tuple[str, str]]:
    """The first messages, if there are tools: these stand in front of the user's."""
    is_first, start = "eq $i 0", _literal(tools.alone)
    if tools.system is not None:
        is_first = 'or (eq $i 0) (and (eq $i 1) (eq $last "system"))'
        text = _content(".Content", pieces.trims["system"][""])
        yield 'and $.Tools (eq $i 0) (eq .Role "system")', _literal(tools.system) + text
        start = f"{{{{ if $i }}}}{_literal(tools.before_tools)}{{{{ else }}}}{start}{{{{ end }}}}"
    between = (
        "{{ if ne (len (slice $.Tools $j)) 1 }}"
        f"{_literal(tools.between_tools)}{{{{ end }}}}{{{{ end }}}}"
    )
    content = _content(".Content", pieces.trims["user"].get("", ""))
    yield (
        f'and $.Tools (eq .Role "user") ({is_first})',
        f"{start}{{{{ range $j, $_ := $.Tools }}}}{tool_source(tools.is_indented)}{between}"
        f"{_literal(tools.after_tools)}{content}{_literal(pieces.after['user'])}",
    )


def _calls(tools: ToolPieces, content: str) -> str:
    """The content of an assistant's message and its calls.

    Ollama finds the mark that calls begin with as the first text inside `if .ToolCalls`.
    """
    before, middle, after = map(_literal, tools.call)
    written = (
        f"{{{{ range $j, $_ := .ToolCalls }}}}{before}{{{{ .Function.Name }}}}{middle}"
        f'{{{{ template "json" (json .Function.Arguments) }}}}{after}'
        "{{ if ne (len (slice $calls $j)) 1 }}"
        f"{_literal(tools.between_calls)}{{{{ end }}}}{{{{ end }}}}"
    )
    calls = "{{ $calls := .ToolCalls }}"
    if tools.after_content is None:
        return f"{calls}{{{{ if .ToolCalls }}}}{written}{{{{ else }}}}{content}{{{{ end }}}}"
    gap = f"{{{{ if and .Content $calls }}}}{_literal(tools.after_content)}{{{{ end }}}}"
    return f"{calls}{content}{gap}{{{{ if .ToolCalls }}}}{written}{{{{ end }}}}"


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
    if trim == "jsonBody":
        return f'{{{{ template "jsonBody" (slice (json {path}) 1) }}}}'
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
