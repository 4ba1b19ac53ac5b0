"""Encodes documents: the token ids and the loss mask of a text or a chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np

from xinslm.data.config import DocumentEnd
from xinslm.data.records import Document
from xinslm.errors import UsageError, XinslmError
from xinslm.tokenizer.show import visible

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """One document as the dataset stores it."""

    tokens: np.ndarray
    mask: np.ndarray
    """uint8, 1 = this token is a target; the first never is, because nothing predicts it."""
    num_bytes: int
    """UTF-8 bytes of the text; of a chat, of the answers."""


class Encoder:
    """Encodes documents with one tokenizer; `document_end` selects the last token of a text."""

    def __init__(
        self, tokenizer: "Tokenizer", document_end: DocumentEnd, train_on_prompts: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on_prompts = train_on_prompts
        last = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "none": None}[document_end]
        if document_end != "none" and last is None:
            raise UsageError(
                f"--document-end {document_end}: the tokenizer has no {document_end.upper()} "
                "token; choose another"
            )
        self._start = list(tokenizer.start_ids)
        self._end = [] if last is None else [last]

    def __call__(self, documents: Sequence[Document]) -> list[Encoded]:
        """Encode documents; plain texts are encoded in one batch."""
        texts = [document.text for document in documents if document.text is not None]
        ids, offsets = self.tokenizer.encode_batch(texts)
        plain = (ids[begin:end] for begin, end in pairwise(offsets))
        return [
            self._chat(document)
            if document.text is None
            else self._plain(next(plain), len(document.text.encode()))
            for document in documents
        ]

    def _plain(self, ids: np.ndarray, num_bytes: int) -> Encoded:
        tokens = np.concatenate([self._start, ids, self._end]).astype(np.int64)
        mask = np.ones(len(tokens), np.uint8)
        mask[: max(1, len(self._start))] = 0
        return Encoded(tokens, mask, num_bytes)

    def can_cut(self, document: Document, encoded: Encoded) -> bool:
        """Return whether a document is a plain text of at least two tokens."""
        frame = len(self._start) + len(self._end)
        return document.text is not None and len(encoded.tokens) >= frame + 2

    def cut(self, encoded: Encoded, tail_tokens: int) -> tuple[Encoded, Encoded]:
        """Cut a plain text into two documents, the second of at most `tail_tokens`.

        The cut is at the first line end in the first quarter of the tail, else at a space.
        """
        begin, end = len(self._start), len(encoded.tokens) - len(self._end)
        at = min(max(end - tail_tokens, begin + 1), end - 1)
        at = self._boundary(encoded.tokens, at, min(at + min(tail_tokens // 4, 4096), end - 1))
        tail = encoded.tokens[at:end]
        ids, counts = np.unique(tail, return_counts=True)
        sizes = [len(self.tokenizer.token_bytes(int(token))) for token in ids]
        tail_bytes = min(int(np.dot(sizes, counts)), encoded.num_bytes)
        head = self._plain(encoded.tokens[begin:at], encoded.num_bytes - tail_bytes)
        return head, self._plain(tail, tail_bytes)

    def _boundary(self, tokens: np.ndarray, first: int, last: int) -> int:
        """Return the best index for a cut in `first`..`last`, if possible between characters."""
        data = [self.tokenizer.token_bytes(int(token)) for token in tokens[first - 1 : last + 1]]
        pairs = list(enumerate(pairwise(data), start=first))
        for is_good in (
            lambda before, after: before.endswith(b"\n"),
            lambda before, after: before.endswith(b" ") or after.startswith(b" "),
            lambda before, after: not after or after[0] & 0xC0 != 0x80,
        ):
            for place, (before, after) in pairs:
                if is_good(before, after):
                    return place
        return first

    def _chat(self, document: Document) -> Encoded:
        if self.tokenizer.chat_template is None:
            raise XinslmError(
                f"{document.source} is a chat, but the tokenizer has no chat template. Put one "
                "into the tokenizer's folder as chat_template.jinja, or use a tokenizer that has "
                "one (`xinslm tokenizer train` adds it)"
            )
        messages = [dict(message) for message in document.messages or ()]
        ids, targets = self.tokenizer.apply_chat_template(messages)
        mask, counted = np.asarray(targets, np.uint8), {"assistant"}
        if self.train_on_prompts:
            mask, counted = np.ones(len(ids), np.uint8), {message["role"] for message in messages}
        mask[:1] = 0
        num_bytes = sum(len(m["content"].encode()) for m in messages if m["role"] in counted)
        return Encoded(np.asarray(ids, np.int64), mask, num_bytes)


_FIRST_LINES, _LAST_LINES, _SCREEN_TOKENS = 12, 8, 2000


def show(tokenizer: "Tokenizer", document: Document, encoded: Encoded) -> str:
    """Format a document's tokens on one screen, in runs: `-` is context, `+` are targets."""
    targets = int(encoded.mask.sum())
    lines = [f"{document.source}: {len(encoded.tokens):,} tokens, {targets:,} of them targets"]
    is_long = len(encoded.tokens) > 2 * _SCREEN_TOKENS
    parts = [slice(_SCREEN_TOKENS), slice(-_SCREEN_TOKENS, None)] if is_long else [slice(None)]
    rows = [_lines(tokenizer, encoded.tokens[part], encoded.mask[part]) for part in parts]
    if not is_long and len(rows[0]) <= _FIRST_LINES + _LAST_LINES:
        lines += rows[0]
    else:
        lines += [*rows[0][:_FIRST_LINES], "  ...", *rows[-1][-_LAST_LINES:]]
    return "\n".join(lines) + "\n"


def _lines(tokenizer: "Tokenizer", tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    lines = []
    pairs = zip(mask.tolist(), tokens.tolist(), strict=True)
    for is_target, run in groupby(pairs, key=lambda pair: pair[0]):
        line = sign = "  + " if is_target else "  - "
        for _, token in run:
            text = visible(tokenizer.token_bytes(token)) + "|"
            if len(line) + len(text) > 110 and line != sign:
                lines.append(line)
                line = sign
            line += text
        lines.append(line.removesuffix("|"))
    return lines
