"""Tools in Ollama templates: the text and ids of transformers, by our evaluator and by Go."""

import json
import re

import pytest
from chat_templates import UNKNOWN_TOOLS, WITH_TOOLS
from test_ollama_template import chat, with_template
from transformers import PreTrainedTokenizerFast

from small_models import save_random_model, save_tokenizer
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run
from xinslm.export.go_template import execute
from xinslm.export.ollama_template import collate, make_template


def tool(name, description, properties, required=()):
    parameters = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = list(required)
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool(
        "weather",
        'of a "place" <now> & then\n\\u003c \\ \x0c\u2028 ünï: {a, b}',
        {
            "where": {"type": "string", "description": "city, country: any"},
            "days": {"type": "integer", "enum": [1, 2.5, "x<y", None, True]},
            "box": {
                "type": "object",
                "properties": {"b": {"type": ["number", "null"]}, "a": {"type": "array"}},
                "required": ["b"],
            },
        },
        ["where"],
    ),
    tool("now", "the time", {}),
]


def calling(content, *calls):
    made = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    return [{"role": "assistant", "content": content, "tool_calls": made}]


FIRST = ("weather", {"where": 'Köln & "\n\\\t<b>', "days": 2, "box": {"a": [1.5, []], "b": {}}})
SECOND = ("now", {})
ONE = calling("", FIRST)
CONVERSATIONS = {
    "a question": chat([("user", "Hi {{ . }}")]),
    "system": chat([("system", " Be kind.\n"), ("user", "\tHi\n")]),
    "later turns": chat(
        [("system", "s"), ("user", "1"), ("assistant", "<call>"), ("user", "2"), ("user", "3")]
    ),
    "a call": chat([("user", "u")]) + ONE + chat([("tool", '{"t": "20 °C"}\n')]),
    "an answer": chat([("system", "s"), ("user", "u")])
    + ONE
    + chat([("tool", "a"), ("assistant", "It is 20 °C."), ("user", "Thanks")]),
    "a text and a call": chat([("user", "u")]) + calling(" I look.", SECOND) + chat([("tool", "")]),
    "two calls": chat([("user", "u")])
    + calling("", FIRST, SECOND)
    + chat([("tool", '"a"'), ("tool", "b\n\nc"), ("assistant", "x"), ("user", "y")]),
    "a text and two calls": chat([("user", "u")])
    + calling("Now:", SECOND, FIRST)
    + chat([("tool", "a"), ("tool", "b")]),
    "twice": chat([("user", "u")])
    + ONE
    + chat([("tool", "a")])
    + ONE
    + chat([("tool", "b"), ("user", "and?")]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


def by_transformers(path, messages, tools, tokenize=False):
    """Text or ids of messages as Ollama merges them; None if the template refuses them."""
    merged = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] != "tool":
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(dict(message))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    try:
        return tokenizer.apply_chat_template(
            merged,
            tools=tools or None,
            add_generation_prompt=True,
            tokenize=tokenize,
            return_dict=False,
        )
    except Exception as error:
        assert "one call at once" in str(error), error
        return None


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_text_and_ids_are_those_of_the_chat_template(name, adds_bos, folder, tmp_path):
    tokenizer = with_template(folder, WITH_TOOLS[name], tmp_path)
    template = make_template(tokenizer, adds_bos)
    assert template.has_tools and not template.notes
    count = 0
    for messages in CONVERSATIONS.values():
        for tools in ([], TOOLS[:1], TOOLS):
            expected = by_transformers(tmp_path, messages, tools)
            if expected is None:
                continue
            count += 1
            text = execute(template.text, collate(messages, tools))
            if adds_bos:
                expected = expected.removeprefix("<|begin|>")
            assert text == expected
            ids = by_transformers(tmp_path, messages, tools, tokenize=True)
            found = tokenizer.encode(text, allowed_special=True)
            assert found == ids[len(ids) - len(found) :] and len(ids) - len(found) <= adds_bos
    assert count == 3 * (len(CONVERSATIONS) - (2 if name == "LLaMA 3.1" else 0))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_go_gives_the_same_text(name, folder, tmp_path, go):
    text = make_template(with_template(folder, WITH_TOOLS[name], tmp_path), False).text
    inputs = [
        {"template": text, "messages": messages, "tools": tools}
        for messages in CONVERSATIONS.values()
        for tools in ([], TOOLS[:1], TOOLS)
    ]
    for given, found in zip(inputs, go(inputs), strict=True):
        assert found == execute(text, collate(given["messages"], given["tools"]))
        expected = by_transformers(tmp_path, given["messages"], given["tools"])
        assert expected is None or found == expected


def test_a_long_tool_is_no_deeper_than_go_allows(folder, tmp_path, go):
    text = make_template(with_template(folder, WITH_TOOLS["LLaMA 3.1"], tmp_path), False).text
    tools = [tool("long", "é<\n" * 7_000, {"x": {"type": "string"}})]
    messages = CONVERSATIONS["system"]
    (found,) = go([{"template": text, "messages": messages, "tools": tools}])
    assert found == by_transformers(tmp_path, messages, tools)


def test_the_modelfiles_system_message_is_the_default_one(folder, tmp_path):
    tokenizer = with_template(folder, WITH_TOOLS["Hermes, default system"], tmp_path)
    template = make_template(tokenizer, False)
    assert template.pieces.default_system == "Be of help."
    messages = CONVERSATIONS["a call"]
    system = [{"role": "system", "content": "Be of help."}]
    expected = by_transformers(tmp_path, messages, TOOLS)
    assert execute(template.text, collate(system + messages, TOOLS)) == expected


@pytest.mark.parametrize("name", UNKNOWN_TOOLS)
def test_unknown_tools_leave_a_template_without_them(name, folder, tmp_path):
    template, reason = UNKNOWN_TOOLS[name]
    made = make_template(with_template(folder, template, tmp_path), False)
    assert not made.has_tools and ".Tools" not in made.text
    assert re.search(rf"TEMPLATE has no tools: .*{reason}", made.notes[-1])
    messages = CONVERSATIONS["later turns"]
    assert execute(made.text, collate(messages)) == by_transformers(tmp_path, messages, [])


def test_keys_that_ollama_orders_otherwise_are_kept(folder, tmp_path, go):
    """Parameters with keys that the template does not name are written in Ollama's order."""
    text = make_template(with_template(folder, WITH_TOOLS["Hermes"], tmp_path), False).text
    given = tool("f", "d", {"x": {"type": "string"}}, ["x"])
    given["function"]["parameters"]["$defs"] = {"y": 1}
    found = go([{"template": text, "messages": CONVERSATIONS["system"], "tools": [given]}])[0]
    assert (
        '"parameters": {"type": "object", "$defs": {"y": 1}, "required": ["x"], "properties": '
        '{"x": {"type": "string"}}}}}\n' in found
    )


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_the_modelfile_has_tools_and_says_what_they_need(name, tmp_path):
    save_random_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(WITH_TOOLS[name], newline="")
    result = run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", ollama=True))
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
    # Ollama looks there for the text that a call begins with
    start = re.search(r"{{ if .ToolCalls }}{{ range [^}]*}}(.*?){{", template, re.S)[1]
    assert start == ('{"name": "' if name == "LLaMA 3.1" else '<call>\n{"name": "')
    (note,) = (note for note in result.notes if "tool" in note)
    assert f"# {note}" in text and "description, parameters (type, properties, required)" in note
    stops = re.findall(r'PARAMETER stop "([^"]+)"', text)
    assert stops[0] == "<|end|>" and not any("result" in stop for stop in stops)


@pytest.mark.parametrize(
    "source",
    [
        "{{ json .Tools }}",
        "{{ range .Tools }}{{ json .Function.Parameters }}{{ json .Function.Name }}{{ end }}",
        '{{ range .Tools }}{{ printf "<%s|%s>" .Type (json .Function.Parameters.Required) }}'
        "{{ end }}",
        "{{ range .Messages }}{{ range $i, $c := .ToolCalls }}{{ $i }}"
        "{{ json $c.Function.Arguments }}{{ end }}{{ json .Content }}{{ end }}",
    ],
)
def test_the_evaluators_json_is_that_of_go(source, go):
    messages = CONVERSATIONS["a text and two calls"]
    given = [{"template": source, "messages": messages, "tools": TOOLS}]
    found, ours = go(given)[0], execute(source, collate(messages, TOOLS))
    # form feed: Go before 1.22 has another escape for it
    assert found.replace("\\u000c", "\\f").replace("null", "[]") == ours.replace("null", "[]")
    assert json.loads(f"[{json.dumps(ours)}]")
