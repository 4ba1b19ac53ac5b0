"""Conversations: render a chat template, encode the text, and compute the loss mask of the
assistant's content.

Ids and mask equal those of transformers' `apply_chat_template(...,
return_assistant_tokens_mask=True)`, with two additions. If a template has no `{% generation %}`
marks, the mask comes from rendering with invisible characters around the assistant's content.
Control tokens inside a message are encoded as ordinary text, so that no message can fake a turn.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
import regex

from xinslm.errors import XinslmError
from xinslm.tokenizer.base import Tokenizer, clean_surrogates
from xinslm.tokenizer.sandbox import LimitedEnvironment, LimitError, render

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of our own tokenizers: `<|im_start|>role`, a line break, the content, `<|im_end|>`,
a line break; BOS comes first (`with_start`).
"""

# Unicode noncharacters: no text meant for interchange contains them.
_BEGIN, _END, _CONTROL = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = regex.compile(f"[{_BEGIN}{_END}]")

Message = dict[str, str]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: puts marks around its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return _BEGIN + caller() + _END


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    """Compile a template in a sandbox, with the settings and functions that transformers uses."""
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.compile_limited(template)


def _render(template: str, messages: list[Message], prompt: bool, other: dict[str, Any]) -> str:
    try:
        names = {"messages": messages, "add_generation_prompt": prompt, **other}
        return render(_compile(template), names)
    except Exception as error:  # a template is third-party code
        if isinstance(error, LimitError):
            what = f"was stopped: {error}. Look at its chat_template.jinja"
        elif isinstance(error, jinja2.TemplateError):
            what = f"refuses this conversation: {error!s:.500}"
        else:
            what = f"fails on this conversation: {error!r:.500}"
        raise XinslmError(f"the tokenizer's chat template {what}") from None


def _check(messages: list[Message]) -> None:
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise XinslmError(
                    f"message {index} of the conversation has no text under '{key}': {message!r}"
                )
    if not messages:
        raise XinslmError("the conversation has no messages")


def _require_template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise XinslmError(
            "this tokenizer has no chat template. Put a chat_template.jinja in the folder of its "
            "tokenizer.json, or use plain text instead of messages"
        )
    return tokenizer.chat_template


def encode_chat(
    tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool
) -> tuple[list[int], list[int]]:
    """Turn a conversation into ids and a loss mask of the same length."""
    template, names = _require_template(tokenizer), tokenizer.named_tokens
    _check(messages)
    tokens = sorted(tokenizer.special_tokens, key=len, reverse=True)
    finder = regex.compile("|".join(map(regex.escape, tokens)) or r"(?!)")
    hidden = [
        {
            key: _hide(value, finder, tokens) if isinstance(value, str) else value
            for key, value in message.items()
        }
        for message in messages
    ]
    marked = _marked(template, hidden, add_generation_prompt, names, finder)
    text, ranges = _take_marks(clean_surrogates(marked))
    segments, moved = _segments(text, finder, tokens)
    ids, spans = tokenizer.encode_segments(segments)
    mask = np.zeros(len(ids), np.int64)
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    for begin, end in ranges:
        mask[(starts < moved(end)) & (ends > moved(begin))] = 1
    return ids, mask.tolist()


def render_chat(
    tokenizer: Tokenizer,
    messages: list[Message],
    add_generation_prompt: bool = False,
    **extra: Any,
) -> str:
    """Turn a conversation into the text of the template, BOS included where it writes it.

    `extra` are further variables of the template, such as `tools`. XinslmError if there is no
    template, or if it refuses the conversation.
    """
    template = _require_template(tokenizer)
    other = tokenizer.named_tokens | extra
    return _MARKS.sub("", _render(template, messages, add_generation_prompt, other))


def with_start(template: str, names: dict[str, str]) -> str:
    """Return a template whose conversations begin with BOS.

    llama.cpp begins a chat like any text, independent of the template, so both must begin alike.
    """
    try:
        text = _render(template, [{"role": "user", "content": "a"}], False, names)
    except XinslmError:  # a template that needs other messages remains unchanged
        return template
    return template if text.startswith(names["bos_token"]) else "{{ bos_token }}" + template


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a text or turn: EOS, BOS (in llama2.c), the assistant's last."""
    ids = {tokenizer.eos_id, tokenizer.bos_id}
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tokens, mask = tokenizer.apply_chat_template(turn)
        answer = [token for token, counts in zip(tokens, mask, strict=True) if counts]
        ids |= set(answer[-1:]) & set(tokenizer.special_tokens.values())
    return frozenset(id for id in ids if id is not None)


def _hide(content: str, finder: regex.Pattern[str], tokens: list[str]) -> str:
    """Replace control tokens in a message by placeholders."""
    clean = regex.sub(f"[{_BEGIN}{_END}{_CONTROL}]", "\ufffd", content)
    return finder.sub(lambda match: f"{_CONTROL}{tokens.index(match[0])}{_CONTROL}", clean)


def _marked(
    template: str,
    messages: list[Message],
    prompt: bool,
    names: dict[str, str],
    finder: regex.Pattern[str],
) -> str:
    """Render with marks around the assistant's content and end token."""
    if regex.search(r"\{%-?\s*generation\s*-?%\}", template):
        return _render(template, messages, prompt, names)
    plain = _render(template, messages, prompt, names)
    said = sum(message["role"] == "assistant" for message in messages)
    # Marks around all of the content; if the template trims it, around the trimmed content.
    for pattern in (r"(?s)()^(.*)$()", r"(?s)^(\s*)(.*?)(\s*)$"):
        wrapped = [
            message
            | {"content": regex.sub(pattern, rf"\1{_BEGIN}\2{_END}\3", message["content"], count=1)}
            if message["role"] == "assistant"
            else message
            for message in messages
        ]
        marked = _render(template, wrapped, prompt, names)
        if _MARKS.sub("", marked) == plain and marked.count(_BEGIN) == marked.count(_END) == said:
            break
    else:
        raise XinslmError(
            "cannot find the assistant's tokens: the tokenizer's chat template changes their "
            "content and has no {% generation %} marks. Add these around the assistant's content "
            "and end token in chat_template.jinja"
        )
    end = regex.escape(names.get("eos_token") or "") or r"(?!)"
    end_token = regex.compile(rf"{_END}(\s*{end}|{finder.pattern})")
    return end_token.sub(rf"\1{_END}", marked)


def _take_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove the marks; return the text and the ranges of characters between them."""
    parts = _MARKS.split(marked)
    edges = np.cumsum([len(part) for part in parts[:-1]], dtype=np.int64).tolist()
    return "".join(parts), list(zip(edges[::2], edges[1::2], strict=True))


def _segments(
    text: str, finder: regex.Pattern[str], tokens: list[str]
) -> tuple[list[tuple[str, bool]], Callable[[int], int]]:
    """Split a rendered text at its control tokens and restore what `_hide` replaced.

    Also return the function from an index in `text` to the index in the joined segments.
    """
    segments: list[tuple[str, bool]] = []
    before, after = [0], [0]
    done = 0

    placeholder = regex.compile(rf"{_CONTROL}(\d+){_CONTROL}")
    for match in [*finder.finditer(text), None]:
        ordinary = text[done : match.start() if match else len(text)]
        if ordinary:
            restored, at = "", 0
            for hole in placeholder.finditer(ordinary):
                content = tokens[int(hole[1])]
                restored += ordinary[at : hole.start()] + content
                at = hole.end()
                before.append(done + at)
                after.append(after[-1] + before[-1] - before[-2] - len(hole[0]) + len(content))
            segments.append((restored + ordinary[at:], False))
        if match:
            segments.append((match[0], True))
            done = match.end()

    def moved(index: int) -> int:
        at = int(np.searchsorted(before, index, side="right")) - 1
        return after[at] + index - before[at]

    return segments, moved
