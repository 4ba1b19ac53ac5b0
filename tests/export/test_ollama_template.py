"""Ollama templates against Go's text/template and transformers' rendering of the Jinja template."""

import shutil
from pathlib import Path

import pytest
from chat_templates import STRIPS_REASONING, TEMPLATES, UNKNOWN
from transformers import PreTrainedTokenizerFast

from small_models import save_tokenizer
from xinslm.export.chat_pieces import UnknownTemplateError
from xinslm.export.go_template import GoTemplateError, execute, quote
from xinslm.export.ollama_template import collate, make_template
from xinslm.tokenizer.load import load_tokenizer

CONVERSATIONS = [
    [("user", "Hi")],
    [("user", " Hi\n"), ("assistant", "\tHello! {{ .Content }}\n\n"), ("user", "\u3000and\u00a0")],
    [("system", " Be 'short' & \"kind\".\n"), ("user", "¿Qué?\r\n\r\n🙂")],
    [
        ("system", "a\n\nb"),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "</think>{"),
        ("user", ""),
    ],
    [("user", "one"), ("user", "two"), ("assistant", "x\x1f"), ("user", "\u2028three\x85")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


def with_template(folder: Path, template: str, path: Path):
    """A tokenizer whose chat template is `template`, and the folder it is in."""
    shutil.copytree(folder, path, dirs_exist_ok=True)
    (path / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    return load_tokenizer(path)


def by_transformers(path: Path, messages) -> str | None:
    """The text that transformers makes of messages as Ollama merges them; None if refused."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    merged = [{"role": m["Role"], "content": m["Content"]} for m in collate(messages)["Messages"]]
    try:
        return tokenizer.apply_chat_template(merged, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        assert "alternate" in str(error), error
        return None


def chat(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_the_chat_template(name, adds_bos, folder, tmp_path):
    tokenizer = with_template(folder, TEMPLATES[name], tmp_path)
    template = make_template(tokenizer, adds_bos)
    count = 0
    for messages in map(chat, CONVERSATIONS):
        expected = by_transformers(tmp_path, messages)
        if expected is not None:
            count += 1
            expected = expected.removeprefix("<|begin|>") if adds_bos else expected
            assert execute(template.text, collate(messages)) == expected
    assert count == 3 if name == "Mistral" else 5


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_gives_the_same_text(name, folder, tmp_path, go):
    tokenizer = with_template(folder, TEMPLATES[name], tmp_path)
    text = make_template(tokenizer, False).text
    inputs = [{"template": text, "messages": chat(pairs)} for pairs in CONVERSATIONS]
    for given, found in zip(inputs, go(inputs), strict=True):
        expected = by_transformers(tmp_path, given["messages"])
        assert found == execute(text, collate(given["messages"]))
        assert expected is None or found == expected


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_template_that_has_no_go_form_is_refused(name, folder, tmp_path):
    template, reason = UNKNOWN[name]
    tokenizer = with_template(folder, template, tmp_path)
    with pytest.raises(UnknownTemplateError, match=reason):
        make_template(tokenizer, False)


def test_reasoning_that_is_stripped_is_a_note(folder, tmp_path):
    """As Qwen3 does. Ollama gives the template answers without their reasoning."""
    made = make_template(with_template(folder, STRIPS_REASONING, tmp_path), False)
    assert made.has_tools and len(made.notes) == 1
    assert "an answer holds its reasoning" in made.notes[0]
    assert "the last message is the assistant's" in made.notes[0]
    for pairs in CONVERSATIONS[:3]:
        expected = by_transformers(tmp_path, chat(pairs))
        assert execute(made.text, collate(chat(pairs))) == expected
    pairs = [("user", "1"), ("assistant", "<think>x</think>y"), ("user", "2")]
    assert "x" in execute(made.text, collate(chat(pairs))), "what the note says"


def test_a_default_system_message_is_found(folder, tmp_path):
    tokenizer = with_template(folder, TEMPLATES["default system"], tmp_path / "a")
    assert make_template(tokenizer, False).pieces.default_system == "You are a {{test}} robot."
    tokenizer = with_template(folder, TEMPLATES["LLaMA 3.1"], tmp_path / "b")
    assert make_template(tokenizer, False).pieces.default_system is None


@pytest.mark.parametrize(
    "source",
    [
        "a {{- if .System }} b {{ else if eq .X 1 2 }} c {{- else }}d{{ end }} e",
        '{{ define "f" }}[{{ . }}]{{ end }}{{ template "f" .System }}'
        '{{ template "f" (slice .System 1) }}',
        '{{ $x := "q" }}{{ range $i, $m := .Messages }}{{ $i }}{{ $x }}{{ $x = $m.Role }}{{ end }}'
        "{{ $x }}",
        "{{ range .Messages }} {{- .Content -}} {{ end }}",
        '{{ if and .System (ne .System "x") (ge (len .Messages) 2) }}yes{{ end }}{{ len .System }}',
        '{{ if or (not .System) (eq (len (slice $.Messages 1)) 1) }}{{ "\\u00e9\\n\\"" }}{{ end }}',
        "{{ range $m := .Messages }}{{ if $m.Content }}{{ $m.Content }},{{ end }}{{ end }}",
        "{{ slice .System 1 2 }}{{ $x := 1 }}{{ if .System }}{{ $x := 2 }}{{ $x }}{{ end }}"
        "{{ $x }}",
    ],
)
def test_the_evaluator_agrees_with_go(source, go):
    for pairs in [*CONVERSATIONS[2:4], [("system", "abc"), ("user", "u")]]:
        data = {"template": source, "messages": chat(pairs)}
        assert execute(source, {"X": 1, **collate(chat(pairs))}) == go([data])[0].replace(
            "<no value>", ""
        )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ if .A }}x", "end"),
        ("{{ $x = 1 }}", "not declared"),
        ("{{ html .A }}", "no function 'html'"),
        ('{{ printf "%d" .A }}', "printf knows %s"),
        ("{{ .A", "not closed"),
        ("{{ (len .A }}", "not closed"),
        ("{{ slice .A 5 }}", "slice 5"),
        ('{{ template "x" . }}', "no template 'x'"),
        ('{{ "\\x41" }}', "unknown escape"),
    ],
)
def test_what_the_evaluator_does_not_know_is_an_error(source, reason):
    with pytest.raises(GoTemplateError, match=reason):
        execute(source, {"A": "abc"})


def test_strings_are_quoted_for_go(go):
    text = 'a"b\\c\n\t\u00a0\u200b😀\U000e0001\x85'
    assert execute(f"{{{{ {quote(text)} }}}}", {}) == text
    assert go([{"template": f"{{{{ {quote(text)} }}}}", "messages": []}]) == [text]
    assert all(c.isprintable() for c in quote(text))
