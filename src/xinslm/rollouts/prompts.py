"""Prompts for a teacher: records that `prepare` reads, with or without an answer, and lines of
text.

{"prompt"}, {"instruction", "input"}, {"messages"} and {"conversations"} give a chat up to the last
user message; {"text"} and lines of a .txt file give the beginning of a text. MT-bench's {"turns"}
gives its first turn, because the others refer to its answer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xinslm.data.formats import SUFFIXES, suffix
from xinslm.data.read import read_documents
from xinslm.data.records import Document, to_document
from xinslm.errors import UsageError, XinslmError
from xinslm.teachers.base import Prompt


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts in order; UsageError if it does not exist, XinslmError if it is
    damaged.
    """
    if not path.is_file():
        raise UsageError(f"--prompts {path}: there is no such file")
    if suffix(path) not in SUFFIXES:
        raise UsageError(
            f"--prompts {path}: unknown kind of file; known endings are {', '.join(SUFFIXES)}"
        )
    prompts = list(_read(path))
    if not prompts:
        raise XinslmError(f"--prompts {path}: there is no prompt in it")
    return prompts


def _read(path: Path) -> Iterator[Prompt]:
    if path.suffix not in (".jsonl", ".txt"):
        for document in read_documents([str(path)]):
            yield to_prompt(document)
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError:
            raise XinslmError(f"{where}: not UTF-8 text; convert the file") from None
        if not text.strip():
            continue
        if path.suffix == ".txt":
            yield text
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise XinslmError(
                f"{where}: not valid JSON ({getattr(error, 'msg', 'nested too deep')})"
            ) from None
        yield to_prompt(to_document(_with_answer(record), where))


def _with_answer(record: Any) -> Any:
    """Add the empty answer that the record's form requires."""
    if isinstance(record, dict):
        if "instruction" in record and "output" not in record:
            return {**record, "output": ""}
        if "prompt" in record and not {"response", "completion"} & record.keys():
            return {**record, "response": ""}
    return record


def to_prompt(document: Document) -> Prompt:
    """A chat up to the last user message, or a text as it is."""
    if document.messages is None:
        return document.text or ""
    messages = list(document.messages)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise XinslmError(f"{document.source}: the chat has no message of the user's to answer")
    return messages
