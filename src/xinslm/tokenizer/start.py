"""The start token: the token that a tokenizer prepends to a text.

It is in the post-processor of tokenizer.json (a `TemplateProcessing`, as in LLaMA-3), so that
`AutoTokenizer`, an exported GGUF file and this package give the same ids for the same text, in
training, scoring and generation alike. A tokenizer that adds nothing (SmolLM2, Qwen) has documents
that begin with their first token, which no position predicts: its BOS, if it has one, may mean
something else, such as the start of a chat's turn. `encode` does not add the start token; the code
that builds a prompt or document does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer


def start_processor(content: str, token: int) -> dict[str, Any]:
    """Return the post-processor that prepends one special token to a text."""
    special = {"SpecialToken": {"id": content, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, second],
        "special_tokens": {content: {"id": content, "ids": [token], "tokens": [content]}},
    }


def start_ids(processor: dict[str, Any] | None, vocab_size: int) -> list[int]:
    """Return the ids that a post-processor prepends to a text; ValueError for unknown ids."""
    kind, ids = (processor or {}).get("type"), []
    if processor is None:
        return []
    if kind == "Sequence":
        for step in reversed(processor["processors"]):
            ids += start_ids(step, vocab_size)
    elif kind == "TemplateProcessing":
        for piece in processor["single"]:
            if "SpecialToken" not in piece:
                break
            ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        ids = [processor["cls"][1]]
    if any(not isinstance(token, int) or not 0 <= token < vocab_size for token in ids):
        raise ValueError(
            f"its post-processor adds the ids {ids}, which are not all in the vocabulary"
        )
    return ids


def text_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Encode the beginning of a text as `AutoTokenizer` does: start ids, then tokens.

    An empty text has no token to continue; it begins with `prefix_ids`.
    """
    return [*tokenizer.start_ids, *tokenizer.encode(text)] or prefix_ids(tokenizer)


def prefix_ids(tokenizer: "Tokenizer") -> list[int]:
    """Return what a text's first token is predicted from: the start ids, else BOS, else EOS (as in
    lm-evaluation-harness).
    """
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return list(tokenizer.start_ids) or ([] if first is None else [first])
