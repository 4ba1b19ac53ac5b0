"""The start token: what a tokenizer puts in front of a text.

The post-processor of tokenizer.json says it (a `TemplateProcessing`, as in LLaMA-3), so that
`AutoTokenizer`, an exported GGUF file and this package give the same ids for the same text.
`encode` never adds it: whoever makes a prompt or a document does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer


def start_processor(content: str, token: int) -> dict[str, Any]:
    """Return the post-processor that puts one special token in front of a text."""
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
    """Return the ids that a post-processor puts in front of a text; ValueError for unknown ids."""
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
        raise ValueError(f"its post-processor adds the ids {ids}, of which one is unknown")
    return ids


def document_start(tokenizer: "Tokenizer") -> list[int]:
    """Return what a document begins with: the tokenizer's start, else BOS, else EOS.

    Documents need one even if the tokenizer adds none, for it predicts their first token.
    """
    if tokenizer.start_ids:
        return list(tokenizer.start_ids)
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return [] if first is None else [first]
