"""What two models do with text before and after the weights: ids, chats, settings of generation.

Each check returns what it found; XinslmError names the first difference.
"""

from typing import Any

from xinslm.doctor.checks import Skipped, require
from xinslm.errors import XinslmError
from xinslm.files import read_json
from xinslm.model.source import GENERATION, ModelSource
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.chat import render_chat
from xinslm.tokenizer.load import load_tokenizer
from xinslm.tokenizer.sample import SAMPLE

ROLES = ("bos", "eos", "pad")
TEXTS = (SAMPLE, "Zwölf Boxkämpfer, съешь ещё булок, 我们在学习, 1234567 + 0.5 = ?\n\n\t'we'll'")
_USER = {"role": "user", "content": " What is the weather in 東京?\n"}
_ASSISTANT = {"role": "assistant", "content": "Cold,  as ever. 🙂 "}
_SYSTEM = {"role": "system", "content": "Be brief."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}
CHATS: dict[str, tuple[list[dict[str, str]], bool, list[dict[str, Any]] | None]] = {
    "a question": ([_USER], True, None),
    "a system prompt": ([_SYSTEM, _USER], True, None),
    "several turns": ([_USER, _ASSISTANT, _USER], True, None),
    "an answer": ([_SYSTEM, _USER, _ASSISTANT], False, None),
    "tools": ([_USER], True, [_TOOL]),
    "tools and a system prompt": ([_SYSTEM, _USER], True, [_TOOL]),
}
"""Messages, whether an answer is asked for, functions that the model may call."""
_NOT_SETTINGS = {"transformers_version", "_from_model_config"}


def open_tokenizers(a: ModelSource, b: ModelSource) -> tuple[Tokenizer, Tokenizer]:
    """The models' tokenizers; Skipped if neither has one, XinslmError if only one."""
    found: list[Tokenizer] = []
    missing: list[str] = []
    for side, source in (("A", a), ("B", b)):
        try:
            found.append(load_tokenizer(source.path))
        except XinslmError as error:
            missing.append(f"{side}: {error}")
    if len(missing) == 2:
        raise Skipped(f"neither model has a tokenizer to load; {missing[0]}")
    if missing:
        raise XinslmError(missing[0])
    return found[0], found[1]


def same_ids(a: ModelSource, b: ModelSource, ours: Tokenizer, theirs: Tokenizer) -> str:
    """Ids mean the same bytes, have the same roles, and two sample texts have the same ids."""
    sizes = (ours.vocab_size, theirs.vocab_size)
    require(sizes[0] == sizes[1], f"{sizes[0]:,} ids in A, {sizes[1]:,} in B", _OTHER)
    pairs = zip(ours.bytes_of_tokens, theirs.bytes_of_tokens, strict=True)
    differing = [(token, x, y) for token, (x, y) in enumerate(pairs) if x != y]
    if differing:
        token, x, y = differing[0]
        raise XinslmError(
            f"{len(differing):,} of {sizes[0]:,} ids mean other bytes, the first is {token}: {x!r} "
            f"and {y!r}. {_OTHER}"
        )
    control = ours.special_tokens.items() ^ theirs.special_tokens.items()
    if control:
        content, token = min(control, key=lambda item: item[1])
        raise XinslmError(f"{content!r} (id {token}) is a control token in only one. {_OTHER}")
    for role in ROLES:
        ids = [_role(role, *pair) for pair in ((ours, a), (theirs, b))]
        require(ids[0] == ids[1], f"{role.upper()} is {ids[0]} in A, {ids[1]} in B", _OTHER)
    starts = (list(ours.start_ids), list(theirs.start_ids))
    require(starts[0] == starts[1], f"a text starts with {starts[0]} and {starts[1]}", _OTHER)
    count = 0
    for text in TEXTS:
        encoded = list(ours.encode(text)), list(theirs.encode(text))
        at = next((i for i, (x, y) in enumerate(zip(*encoded, strict=False)) if x != y), None)
        if encoded[0] != encoded[1]:
            at = min(map(len, encoded)) if at is None else at
            before = ours.decode(encoded[0][:at])
            raise XinslmError(
                f"{text[:24]!r}... is {len(encoded[0])} ids in A and {len(encoded[1])} in B, which "
                f"part after {before[-24:]!r}: texts are split by another rule"
            )
        count += len(encoded[0])
    return f"{sizes[0]:,} ids, special tokens, and {count} ids of two sample texts equal"


_OTHER = "The same ids mean different text in the two"


def _role(role: str, tokenizer: Tokenizer, source: ModelSource) -> Any:
    own = getattr(tokenizer, f"{role}_id")
    return source.settings.get(f"{role}_token_id") if own is None else own


def same_chats(ours: Tokenizer, theirs: Tokenizer) -> str:
    """Chats become the same text; a chat that both templates refuse counts as the same."""
    templates = (ours.chat_template, theirs.chat_template)
    if templates == (None, None):
        raise Skipped("neither model has a chat template")
    for side, template in zip("AB", templates, strict=True):
        require(template is not None, f"{side} has no chat template", "The other one has")
    refused = 0
    for name, chat in CHATS.items():
        x, y = _rendered(ours, *chat), _rendered(theirs, *chat)
        if x != y:
            raise XinslmError(f"chats with {name} differ: {_difference(x, y)}")
        refused += x is None
    how = "the same template" if templates[0] == templates[1] else "two templates"
    also = f", {refused} refused by both" if refused else ""
    return f"{len(CHATS)} chats, with tools and system prompts, become the same text{also}: {how}"


def _rendered(
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    prompt: bool,
    tools: list[dict[str, Any]] | None,
) -> str | None:
    try:
        extra = {} if tools is None else {"tools": tools}
        return render_chat(tokenizer, messages, prompt, **extra)
    except XinslmError:
        return None


def _difference(x: str | None, y: str | None) -> str:
    if x is None or y is None:
        return f"only the template of {'A' if x is None else 'B'} refuses them"
    at = next((i for i, (c, d) in enumerate(zip(x, y, strict=False)) if c != d), None)
    at = min(len(x), len(y)) if at is None else at
    return f"after {x[max(0, at - 24) : at]!r} comes {x[at : at + 24]!r} and {y[at : at + 24]!r}"


def same_generation(a: ModelSource, b: ModelSource) -> str:
    """generation_config.json: end tokens and settings of sampling."""
    for side, source in (("A", a), ("B", b)):
        if source.kind == "gguf":
            raise Skipped(f"{side} is a GGUF file, which holds none")
    x, y = _generation(a), _generation(b)
    differing = [
        f"{key} is {x.get(key)} in A, {y.get(key)} in B"
        for key in sorted(x.keys() | y.keys())
        if x.get(key) != y.get(key)
    ]
    return require(
        not differing,
        "; ".join(differing) or f"{len(x)} settings equal",
        "Runtimes that read generation_config.json write other text",
    )


def _generation(source: ModelSource) -> dict[str, Any]:
    path = source.path / GENERATION
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise XinslmError(f"{path}: must hold an object, but holds {type(content).__name__}")
    own = {f"{role}_token_id": source.settings.get(f"{role}_token_id") for role in ROLES}
    merged = own | content
    return {k: v for k, v in merged.items() if k not in _NOT_SETTINGS and v is not None}
