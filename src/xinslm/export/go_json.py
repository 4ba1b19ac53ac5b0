r"""JSON as a chat template spells it, in Go's text/template.

Ollama's function `json` writes `{"a":1,"b":"\u003c"}`; `tojson` of a chat template writes
`{"a": 1, "b": "<"}`, or one key a line, which is other tokens. The definitions here go through the
first text character by character and write the second. A definition that calls itself is the only
loop that text/template has; Go allows 100,000 calls inside each other.
"""

import json
from collections.abc import Iterator
from typing import Any

from xinslm.export.go_template import quote

_SPELLED = {
    "\\u003c": "<",
    "\\u003e": ">",
    "\\u0026": "&",
    "\\u2028": "\u2028",
    "\\u2029": "\u2029",
    "\\u0008": "\\b",
    "\\u000c": "\\f",
}
"""What Go escapes in strings, and Python's form."""
_INDENT = 4
_DEEPEST = 9
"""Levels of an indented text; a tool's property of properties is at level 7."""

_TOOL = r"""
{{- $p := .Function.Parameters }}
{{- $needs := "" }}
{{- if $p.Required }}{{ $needs = printf ",\"required\":%s" (json $p.Required) }}{{ end }}
{{- $about := "" }}
{{- if .Function.Description }}
{{- $about = printf ",\"description\":%s" (json .Function.Description) }}
{{- end }}
{{- $type := json $p.Type }}
{{- $properties := json $p.Properties }}
{{- $keys := json $p }}
{{- if eq $keys (printf "{\"type\":%s%s,\"properties\":%s}" $type $needs $properties) }}
{{- $keys = printf "{\"type\":%s,\"properties\":%s%s}" $type $properties $needs }}
{{- end }}
{{- $head := printf "{\"type\":%s,\"function\":{\"name\":%s" (json .Type) (json .Function.Name) }}
{{- template "JSON" (printf "%s%s,\"parameters\":%s}}" $head $about $keys) }}"""
_ESCAPE = r"""
{{- define "jsonEscape" }}CASES{{ else }}{{ . }}{{ end }}{{ end }}
"""
_TEXT = r"""
{{- define "TEXT" }}{{ $c := slice . 0 1 }}
{{- if eq $c "\"" }}END
{{- else if ne $c "\\" }}{{ $c }}{{ template "TEXT" (slice . 1) }}
{{- else }}{{ $n := 2 }}{{ if eq (slice . 0 2) "\\u" }}{{ $n = 6 }}{{ end }}
{{- template "jsonEscape" (slice . 0 $n) }}{{ template "TEXT" (slice . $n) }}
{{- end }}{{ end }}
"""
_SPACED = r"""
{{- define "json" }}{{ if . }}{{ $c := slice . 0 1 }}{{ $c }}
{{- if eq $c "\"" }}{{ template "jsonText" (slice . 1) }}
{{- else }}{{ if eq $c "," ":" }}{{ " " }}{{ end }}{{ template "json" (slice . 1) }}{{ end }}
{{- end }}{{ end }}
"""
_LEVEL = r"""
{{- define "HERE" }}{{ if . }}{{ $c := slice . 0 1 }}
{{- $two := $c }}{{ if ge (len .) 2 }}{{ $two = slice . 0 2 }}{{ end }}
{{- if eq $two "{}" "[]" }}{{ $two }}{{ template "HERE" (slice . 2) }}
{{- else if eq $c "\"" }}{{ $c }}{{ template "TEXT" (slice . 1) }}
{{- else if eq $c "{" "[" }}{{ $c }}{{ INNER_LINE }}{{ template "INNER" (slice . 1) }}
{{- else if eq $c "}" "]" }}{{ OUTER_LINE }}{{ $c }}{{ template "OUTER" (slice . 1) }}
{{- else }}{{ $c }}{{ if eq $c "," }}{{ LINE }}{{ else if eq $c ":" }}{{ " " }}{{ end }}
{{- template "HERE" (slice . 1) }}{{ end }}
{{- end }}{{ end }}
"""


def spell(value: Any, is_indented: bool = False) -> str:
    """JSON as `tojson` of a chat template writes it, with `indent=4` if `is_indented`."""
    return json.dumps(value, ensure_ascii=False, indent=_INDENT if is_indented else None)


def tool_source(is_indented: bool) -> str:
    """Go source that writes the tool at the dot as JSON.

    Ollama lists `required` before `properties`; most tools that models were trained with, after.
    Parameters with other keys ($defs) stay in Ollama's order.
    """
    return _TOOL.lstrip("\n").replace("JSON", "json0" if is_indented else "json")


def definitions(is_indented: bool, has_bodies: bool) -> Iterator[str]:
    """Go definitions: "json" writes the JSON at the dot; "json0" indents it; "jsonBody" writes a
    string of JSON, given from behind its first quotation mark, without quotation marks.
    """
    cases = "{{ else ".join(
        f"if eq . {quote(theirs)} }}}}{{{{ {quote(ours)} }}}}" for theirs, ours in _SPELLED.items()
    )
    yield _ESCAPE.replace("CASES", "{{ " + cases)
    yield _text("jsonText", "json")
    yield _SPACED
    if has_bodies:
        yield _TEXT.replace("TEXT", "jsonBody").replace("END", "")
    for depth in range(_DEEPEST + 1) if is_indented else ():
        here, text = f"json{depth}", f"jsonText{depth}"
        yield _text(text, here)
        outer = max(depth - 1, 0)
        names = {
            "HERE": here,
            "TEXT": text,
            "INNER_LINE": _line(depth + 1),
            "OUTER_LINE": _line(outer),
            "INNER": f"json{depth + 1}" if depth < _DEEPEST else "json",
            "OUTER": f"json{outer}",
            "LINE": _line(depth),
        }
        source = _LEVEL
        for name, value in names.items():
            source = source.replace(name, value)
        yield source


def _text(name: str, then: str) -> str:
    """A definition that writes a string from behind its first quotation mark and goes on with the
    definition `then`.
    """
    end = f'{{{{ $c }}}}{{{{ template "{then}" (slice . 1) }}}}'
    return _TEXT.replace("TEXT", name).replace("END", end)


def _line(depth: int) -> str:
    return quote("\n" + " " * _INDENT * depth)
