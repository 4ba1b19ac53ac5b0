"""Refuses to evaluate a quantized model on the text that calibrated it."""

from collections.abc import Sequence
from pathlib import Path

from xinslm.data.text_ids import KnownTexts, plain_tokens
from xinslm.errors import UsageError
from xinslm.evaluate.perplexity import Item
from xinslm.model.files import open_model
from xinslm.tokenizer.base import Tokenizer


def refuse_calibration_text(model: Path, items: Sequence[Item], tokenizer: Tokenizer) -> None:
    """Raise UsageError if a document calibrated the model, or the one that it was exported from."""
    known = KnownTexts(open_model(model).calibration)
    if not known:
        return
    special = list(tokenizer.special_tokens.values())
    found = [item for item in items if known.holds(plain_tokens(item.tokens, special))]
    if found:
        raise UsageError(
            f"{len(found):,} of {len(items):,} documents calibrated {model} when it was quantized, "
            f"the first is {found[0].source}: they would make it look better than it is. Measure "
            "on other text, such as the validation split of that dataset"
        )
