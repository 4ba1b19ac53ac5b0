"""A teacher's answers as text and as a dataset: prompts are context, answers are targets.

An answer that was cut off at its length limit has no end token, because the teacher did not end
there.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.data.config import DocumentEnd
from xinslm.data.dataset import KIND, VERSION
from xinslm.data.encode import Encoded, Encoder
from xinslm.data.holdout import draw_number
from xinslm.data.records import Document
from xinslm.data.writer import SplitWriter
from xinslm.files import write_manifest, write_text
from xinslm.folders import new_folder
from xinslm.teachers.base import Generation, Prompt


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    prompt: Prompt
    written: Generation

    @property
    def document(self) -> Document:
        """Prompt and answer as a document of `prepare`."""
        if isinstance(self.prompt, str):
            return Document("answer", text=self.prompt + self.written.text)
        said = {"role": "assistant", "content": self.written.text}
        return Document("answer", messages=(*(dict(message) for message in self.prompt), said))

    def record(self) -> dict[str, Any]:
        """A line of text.jsonl."""
        document = self.document
        if document.messages is not None:
            return {"messages": list(document.messages), "finished": self.written.finished}
        return {
            "text": document.text,
            "prompt_characters": len(self.prompt),
            "finished": self.written.finished,
        }


def write_text_file(path: Path, answers: Sequence[Answer]) -> None:
    """Write text.jsonl."""
    write_text(
        path, "".join(json.dumps(answer.record(), ensure_ascii=False) + "\n" for answer in answers)
    )


def split_answers(answers: Sequence[Answer], fraction: float, seed: int) -> dict[str, list[Answer]]:
    """Split answers into train and validation by a hash of the prompt, so that all answers to it
    stay together.

    With at least two prompts and a fraction above 0, neither side is empty.
    """
    draws = [draw_number(_digest(answer.prompt), seed) for answer in answers]
    distinct = sorted(set(draws))
    held = [draw for draw in distinct if draw < fraction]
    if fraction > 0 and len(distinct) > 1:
        held = held[: len(distinct) - 1] or distinct[:1]
    splits: dict[str, list[Answer]] = {"train": [], "validation": []}
    for answer, draw in zip(answers, draws, strict=True):
        splits["validation" if draw in held else "train"].append(answer)
    return splits


def _digest(prompt: Prompt) -> bytes:
    content = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def write_dataset(
    folder: Path,
    splits: dict[str, list[Answer]],
    tokenizer: Any,
    end: DocumentEnd,
    config: dict[str, Any],
) -> None:
    """Write a dataset folder atomically."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    finished, cut = Encoder(tokenizer, end, False), Encoder(tokenizer, "none", False)
    facts = {}
    with new_folder(folder) as partial:
        for name, answers in splits.items():
            with SplitWriter(partial / name, dtype) as writer:
                for answer in answers:
                    encoded = encode(answer, finished if answer.written.finished else cut)
                    writer.append(encoded.tokens, encoded.mask, encoded.num_bytes)
                facts[name] = writer.finish()
        tokenizer.save(partial / "tokenizer")
        write_manifest(
            partial,
            KIND,
            VERSION,
            config,
            {"tokenizer": tokenizer.fingerprint()},
            vocab_size=tokenizer.vocab_size,
            dtype=dtype.name,
            document_end=end,
            splits=facts,
            duplicates_dropped=0,
            sources={"answer": sum(map(len, splits.values()))},
            source_names=["answer"],
            without_targets_dropped=0,
        )


def encode(answer: Answer, encoder: Encoder) -> Encoded:
    """Tokens of prompt and answer, with a mask that is 1 on the answer only."""
    encoded = encoder([answer.document])[0]
    tokens, mask = encoded.tokens, encoded.mask.copy()
    if isinstance(answer.prompt, str):
        mask[: _prompt_tokens(answer, tokens, encoder.tokenizer)] = 0
    else:
        targets = np.flatnonzero(mask)
        # earlier answers of the chat are context: the last run of targets is this answer
        if len(targets):
            gaps = np.flatnonzero(np.diff(targets) > 1)
            mask[: targets[gaps[-1] + 1] if len(gaps) else 0] = 0
            if not answer.written.finished:
                last = int(targets[-1])
                stop = (
                    last
                    if int(tokens[last]) in encoder.tokenizer.special_tokens.values()
                    else last + 1
                )
                tokens, mask = tokens[:stop], mask[:stop]
    mask[:1] = 0
    return replace(encoded, tokens=tokens, mask=mask, num_bytes=len(answer.written.text.encode()))


def _prompt_tokens(answer: Answer, tokens: np.ndarray, tokenizer: Any) -> int:
    """Number of tokens of a plain text before the answer, including the start token."""
    special = set(tokenizer.special_tokens.values())
    sizes = [
        0 if token in special else len(tokenizer.token_bytes(token)) for token in tokens.tolist()
    ]
    ends = np.cumsum(sizes)
    whole = answer.document.text or ""
    extra = int(ends[-1]) - len(whole.encode())  # a space that sentencepiece puts before the text
    assert isinstance(answer.prompt, str)
    first = int(np.searchsorted(ends, len(answer.prompt.encode()) + extra, side="right"))
    return min(first, len(tokens))
